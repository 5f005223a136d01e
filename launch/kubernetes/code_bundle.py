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
from contextlib import suppress
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

_SECONDS = 30.0
_LARGEST = 1 << 30
"""The largest sum of the files' sizes in bytes."""
_BLOCK = 4096
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
    """What the files take on a disk, in bytes."""
    version: dict[str, object]
    """The git commit, and whether there are changes since."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what is left out."""
    largest: str = ""
    """The largest files, for messages."""

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and the digest of the archive."""
        return f"sha256:{hashlib.sha256(self.archive).hexdigest()}"

    @property
    def key(self) -> str:
        """The path of the archive on a volume or in an object store."""
        return f".code/{self.digest.removeprefix('sha256:')}.tar.gz"


def collect() -> CodeBundle:
    """The working tree that the working directory is in. Raises UsageError."""
    top, names = _listed()
    found = _found(top, names)
    sizes = {name: each.st_size for name, each in found.items() if stat.S_ISREG(each.st_mode)}
    if sum(sizes.values()) > _LARGEST:
        limit = f"{_LARGEST >> 20} MiB"
        raise UsageError(
            f"-cfg sync=true: the working tree has more than {limit}, but at most {limit} can be "
            f"sent (largest: {_largest(sizes)}); ignore data in .gitignore, or build an image with "
            "the code instead."
        )
    secret, odd = [], []
    out = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", 6, out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, each in found.items():
            path = top / name
            if is_secret_file(name):
                secret.append(name)
            elif stat.S_ISLNK(each.st_mode) and _leads_inside(path, top):
                _add(archive, name, each, link=str(path.readlink()))
            elif not stat.S_ISREG(each.st_mode):
                odd.append(name)
            elif _KEY.search(data := _content(path)):
                secret.append(name)
            else:
                _add(archive, name, each, data)
    notes = []
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
    size = sum(_BLOCK * (2 + each // _BLOCK) for each in sizes.values())  # with its inode
    directory = os.path.relpath(Path.cwd().resolve(), top.resolve())
    version = {key: value for key, value in code_version().items() if key in ("commit", "dirty")}
    return CodeBundle(out.getvalue(), directory, size, version, notes, _largest(sizes))


def _found(top: Path, names: list[str]) -> dict[str, os.stat_result]:
    """Those of the files that exist; git's index may have others."""
    found = {}
    for name in names:
        with suppress(OSError):
            found[name] = (top / name).lstat()
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"-cfg sync=true: {path} cannot be read ({error.strerror}); correct that, or ignore it "
            "in .gitignore."
        ) from None


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


def _largest(sizes: dict[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
    return ", ".join(f"{name} ({sizes[name]:,} bytes)" for name in largest)
