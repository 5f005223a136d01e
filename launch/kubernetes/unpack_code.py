"""Unpacks the code that a run was submitted with; runs in an init container of each pod.

It is sent with the code, so it may use only Python's standard library, and fsspec for a URL.
Arguments: the archive, its URL, or a directory with its parts; the directory to fill; the working
directory in it; and the digest of the archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Those of isorun with the drivers of object stores."""
_RANGE = 16 << 20
"""Bytes of a request to a store. Drivers download whole objects in parallel, which would need more
memory than a small pod has."""


class CodeError(Exception):
    """The code cannot be used now; the text is one sentence."""

    code = 75
    """The exit code."""


class PermanentError(CodeError):
    """Another pod could not use it either."""

    code = 64


def unpack(source: str, target: Path, digest: str) -> None:
    """Fills ``target`` with ``code`` and ``notes``. Raises CodeError."""
    # Unpacked from a copy, so that it is what the digest was computed of.
    with tempfile.TemporaryDirectory(dir=target) as folder:
        copy = Path(folder, "archive")
        _fetch(source, copy)
        with copy.open("rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if found != digest:
                remedy = f"remove {source} and submit it" if _is_url(source) else "submit it"
                raise PermanentError(
                    f"The code of this run has the digest {found}, not {digest}; {remedy} again."
                )
            file.seek(0)
            code = target / "code"
            code.mkdir(exist_ok=True)
            with tarfile.open(fileobj=file, mode="r:gz") as archive:
                if hasattr(tarfile, "data_filter"):
                    archive.extractall(code, filter="data")
                else:
                    archive.extractall(code)
    notes = differences(code)
    (target / "notes").write_text("".join(f"{note}\n" for note in notes))


def _is_url(source: str) -> bool:
    return "://" in source


def _fetch(source: str, copy: Path) -> None:
    """Copies the archive from an object store, a volume or ConfigMaps. Raises CodeError."""
    if _is_url(source):
        _download(source, copy)
        return
    path = Path(source)
    if not path.exists():
        raise PermanentError(
            f"The code of this run is not in {source} on the volume with the runs any more, where "
            "it is removed when it was not used for long; submit the run again."
        )
    with copy.open("wb") as to:
        for part in _parts(path):
            with part.open("rb") as file:
                shutil.copyfileobj(file, to)


def _parts(source: Path) -> list[Path]:
    """The files that are the archive, one after the other."""
    if source.is_dir():
        found = source.glob("part-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("part-")))
    with suppress(OSError):  # it belongs to another user
        os.utime(source)  # it is in use, so it stays on the volume
    return [source]


def _download(url: str, copy: Path) -> None:
    """Copies an object. Raises CodeError."""
    try:
        import fsspec  # type: ignore[import-untyped]

        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        addition = f"isorun[{extra}] (EXTRAS of docker/Dockerfile)" if extra else "it"
        raise PermanentError(
            f"The code of this run is at {url}, but the image lacks the driver of {protocol}:// "
            f"({_line(error)}); build an image with {addition}."
        ) from error
    except Exception as error:  # some drivers connect at once
        raise _unreadable(url, error) from error
    try:
        size = files.info(path)["size"]
        with copy.open("wb") as to:
            for start in range(0, size, _RANGE):
                to.write(files.cat_file(path, start=start, end=min(start + _RANGE, size)))
    except FileNotFoundError as error:
        raise PermanentError(
            f"The code of this run is not at {url} ({_line(error)}); if it was removed, submit the "
            "run again."
        ) from error
    except Exception as error:  # each driver has its own
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> CodeError:
    kind = PermanentError if isinstance(error, PermissionError) else CodeError
    return kind(
        f"The code of this run cannot be read from {url} ({type(error).__name__}: {_line(error)}); "
        "check the credentials of the pods (component object-store), AWS_ENDPOINT_URL and their "
        "network."
    )


def _line(error: Exception) -> str:
    """The first line of an error's text, without a full stop."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0].rstrip(".")


def link_runs(working_directory: Path) -> None:
    """Makes ``runs``, where run directories are by default, a link to the volume with the runs."""
    runs = working_directory / "runs"
    if working_directory.is_dir() and not runs.exists() and not runs.is_symlink():
        runs.symlink_to("/runs")


def differences(code: Path) -> list[str]:
    """Sentences about packages that the tree pins in constraints.txt or names in pyproject.toml,
    and of which this image has another version, or none."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return []
    found = []
    for file, optional, text in _requirements(code):
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if not optional:
                found.append(f"{file} of the submitted code needs {text}, which the image lacks.")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(
                f"The image has {wanted.name} {version}, but {file} of the submitted code has "
                f"{text}."
            )
    return found


def _requirements(code: Path) -> list[tuple[str, bool, str]]:
    """The file, whether the package may be missing, and the text of each requirement."""
    found = []
    constraints = code / "constraints.txt"
    if constraints.is_file():
        for line in constraints.read_text(errors="replace").splitlines():
            text = re.sub(r"\s+#.*|^#.*", "", line).strip()
            if text and not text.startswith("-"):
                found.append(("constraints.txt", True, text))
    project = code / "pyproject.toml"
    if project.is_file():
        import tomllib

        try:
            values = tomllib.loads(project.read_text()).get("project", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            values = {}
        dependencies = values.get("dependencies") if isinstance(values, dict) else None
        for text in dependencies if isinstance(dependencies, list) else []:
            found.append(("pyproject.toml", False, str(text)))
    return found


def main(words: list[str]) -> int:
    """Unpacks; returns the exit code."""
    source, target, directory, digest = words
    try:
        unpack(source, Path(target), digest)
        link_runs(Path(target) / "code" / directory)
        return 0
    except CodeError as failed:
        code, error = failed.code, str(failed)
    except OSError as failed:
        code, error = CodeError.code, f"The code of this run cannot be unpacked: {failed}."
    print(f"isorun: error: {error}", file=sys.stderr)
    with suppress(OSError):
        Path("/dev/termination-log").write_text(error)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
