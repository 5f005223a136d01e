"""Unpacks the code that a run was submitted with; runs in an init container of each pod.

It is sent with the code, so it may use only Python's standard library. Arguments: the archive, or a
directory with its parts; the directory to fill; the working directory in it; and the digest of the
archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tarfile
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import BinaryIO


def unpack(source: Path, target: Path, digest: str) -> str:
    """Fills ``target`` with ``code`` and ``notes``; returns an error, or an empty text."""
    if not source.exists():
        return (
            f"The code of this run is not in {source} on the volume with the runs any more, where "
            "it is removed when it was not used for long; submit the run again."
        )
    # Unpacked from a copy, so that it is what the digest was computed of.
    with tempfile.TemporaryFile(dir=target) as copy:
        found = _copied(_parts(source), copy)
        if found != digest:
            return f"The code of this run has the digest {found}, not {digest}; submit it again."
        copy.seek(0)
        code = target / "code"
        code.mkdir(exist_ok=True)
        with tarfile.open(fileobj=copy, mode="r:gz") as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(code, filter="data")
            else:
                archive.extractall(code)
    notes = differences(code)
    (target / "notes").write_text("".join(f"{note}\n" for note in notes))
    return ""


def _parts(source: Path) -> list[Path]:
    """The files that are the archive, one after the other."""
    if source.is_dir():
        found = source.glob("part-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("part-")))
    with suppress(OSError):  # it belongs to another user
        os.utime(source)  # it is in use, so it stays on the volume
    return [source]


def _copied(paths: list[Path], to: BinaryIO) -> str:
    """Copies files, one after the other; returns the digest."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                to.write(block)
    return f"sha256:{digest.hexdigest()}"


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
        error = unpack(Path(source), Path(target), digest)
        if not error:
            link_runs(Path(target) / "code" / directory)
    except OSError as failed:
        error = f"The code of this run cannot be unpacked: {failed}."
    if error:
        print(f"isorun: error: {error}", file=sys.stderr)
        with suppress(OSError):
            Path("/dev/termination-log").write_text(error)
    return 75 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
