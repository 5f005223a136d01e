"""The files of the working tree as one archive, the same bytes for the same content.

It has what git tracks and what it does not ignore, as the files are now. Files that hold secrets
are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import tarfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from launch.contract import (
    GitError,
    UsageError,
    code_version,
    git,
    is_secret_file,
    listed,
    top_of_repository,
)

PART = 900 << 10
"""Bytes in one ConfigMap, which may have 1 MiB."""
PARTS = 8
_SECONDS = 30.0
_LARGEST = 64 << 20
"""The largest sum of the files' sizes in bytes."""
_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY")
_NAMED = 5


@dataclass(frozen=True)
class CodeBundle:
    """An archive of the working tree."""

    archive: bytes
    """A tar archive, compressed by gzip."""
    directory: str
    """The working directory, relative to the top of the tree; ``.`` for the top."""
    size: int
    """The sum of the files' sizes in bytes."""
    version: dict[str, object]
    """The git commit, and whether there are changes since."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what is left out."""

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and the digest of the archive."""
        return f"sha256:{hashlib.sha256(self.archive).hexdigest()}"

    @property
    def parts(self) -> list[bytes]:
        """The archive in pieces of at most ``PART`` bytes."""
        return [self.archive[at : at + PART] for at in range(0, len(self.archive), PART)]


def collect() -> CodeBundle:
    """The working tree that the working directory is in. Raises UsageError."""
    top, names = _listed()
    notes, sizes, size = [], {}, 0
    secret, odd = [], []
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            path = top / name
            try:
                found = path.lstat()
            except OSError:  # removed, but not from git's index
                continue
            if is_secret_file(name):
                secret.append(name)
            elif stat.S_ISLNK(found.st_mode) and _leads_inside(path, top):
                _add(archive, name, found, link=str(path.readlink()))
            elif not stat.S_ISREG(found.st_mode):
                odd.append(name)
            else:
                sizes[name] = found.st_size
                size += found.st_size
                if size > _LARGEST:
                    limit = f"{_LARGEST >> 20} MiB"
                    raise _too_large(f"more than {limit}", limit, sizes)
                data = path.read_bytes()
                if _KEY.search(data):
                    secret.append(name)
                else:
                    _add(archive, name, found, data)
    if secret:
        notes.append(
            f"{listed(secret)} {'is' if len(secret) == 1 else 'are'} not sent, because of a name "
            "or content like that of credentials."
        )
    if odd:
        notes.append(
            f"{listed(odd)} {'is' if len(odd) == 1 else 'are'} not sent: neither a file nor a link "
            "within the tree."
        )
    packed = gzip.compress(out.getvalue(), mtime=0)
    if len(packed) > PART * PARTS:
        raise _too_large(f"{len(packed):,} bytes compressed", f"{PART * PARTS:,}", sizes)
    directory = os.path.relpath(Path.cwd().resolve(), top.resolve())
    version = {key: value for key, value in code_version().items() if key in ("commit", "dirty")}
    return CodeBundle(packed, directory, size, version, notes)


def _listed() -> tuple[Path, list[str]]:
    """The top of the repository, and the names of its files in order."""
    until = time.monotonic() + _SECONDS
    try:
        top = top_of_repository(until=until)
        options = ("-z", "--cached", "--others", "--exclude-standard")
        found = git("ls-files", *options, until=until, limit=1 << 24, directory=top)
    except GitError as error:
        reason = "it is in no git repository" if error.no_repository else str(error)
        raise UsageError(
            f"-cfg sync=true sends the files of the working directory that git tracks or does not "
            f"ignore, but {reason}; run `git init` there, or build an image with the code instead."
        ) from None
    return top, sorted({os.fsdecode(name) for name in found.split(b"\0") if name})


def _add(
    archive: tarfile.TarFile, name: str, found: os.stat_result, data: bytes = b"", link: str = ""
) -> None:
    """Adds a file or link with nothing that depends on this machine."""
    made = tarfile.TarInfo(name)
    made.mode = 0o755 if found.st_mode & 0o100 else 0o644
    if link:
        made.type, made.linkname = tarfile.SYMTYPE, link
        archive.addfile(made)
    else:
        made.size = len(data)
        archive.addfile(made, io.BytesIO(data))


def _leads_inside(path: Path, top: Path) -> bool:
    """Whether a link is relative and leads to something in the tree."""
    return (
        not path.readlink().is_absolute()
        and path.exists()
        and path.resolve().is_relative_to(top.resolve())
    )


def _too_large(size: str, limit: str, sizes: dict[str, int]) -> UsageError:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
    named = ", ".join(f"{name} ({sizes[name]:,} bytes)" for name in largest)
    return UsageError(
        f"-cfg sync=true: the working tree has {size}, but at most {limit} can be sent (largest: "
        f"{named}); ignore data in .gitignore, or build an image with the code instead."
    )
