"""Durable file writes, and files of others opened with care.

After a crash a written file has its old content or its new content. A file in a directory that
others can write to is opened only if it is a regular file: a symbolic link could lead out of the
directory, and a FIFO or a device could block or act.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 4 << 20  # bytes
_LONGEST_NAME = 255  # bytes, on all common file systems
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """A file is a symbolic link, a FIFO, a socket or a device."""


class TooLargeError(OSError):
    """A file is larger than such a file may be, or than the memory."""


def is_plain_name(name: object) -> bool:
    """Whether a name from a file or a mirror is safe as one component of a path.

    It then has no separator, no control character and no surrogate, is not ``.`` or ``..``, and is
    not longer than a file system allows.
    """
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if any(character in "/\\" or not character.isprintable() for character in name):
        return False
    return len(name.encode("utf-8")) <= _LONGEST_NAME


def open_regular(
    path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o666, *, dir_fd: int | None = None
) -> int:
    """``os.open`` for a file that must be regular; follows no symbolic link at the end of the path.

    Raises NotRegularError for a link, a FIFO, a socket or a device, and IsADirectoryError.
    """
    safe = flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not block
    try:
        descriptor = os.open(path, safe, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            _refuse_kind(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode)
        raise
    try:
        _refuse_kind(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def refuse_irregular(path: str | Path, *, dir_fd: int | None = None) -> None:
    """Raises NotRegularError or IsADirectoryError for what exists and is no regular file, so that
    a library may write to the path."""
    with suppress(FileNotFoundError):
        _refuse_kind(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode)


def _refuse_kind(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise NotRegularError(errno.ELOOP, f"it is {kind}, not a regular file", str(path))


def refuse_link(directory: Path) -> None:
    """Raises NotRegularError if a directory is reached by a symbolic link at the end of its
    path."""
    if directory.is_symlink():
        text = "it is a symbolic link, not a directory"
        raise NotRegularError(errno.ELOOP, text, str(directory))


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises OSError: TooLargeError for a file that is larger than ``limit`` or than the memory.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            text = f"it has {size:,} bytes, more than the {limit:,} that such a file may have"
            raise TooLargeError(errno.EFBIG, text, str(path))
        try:
            ensure_fits_memory(size)
            # Not more than it had when it was checked: it may grow.
            return file.read() if limit is None else file.read(limit)
        except (MemoryError, OverflowError):
            text = f"its {size:,} bytes do not fit into memory"
            raise TooLargeError(errno.EFBIG, text, str(path)) from None


def lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a regular file, without their ends, from the last to the first.

    Of a line that is longer than a block, only a part is given, so that a few blocks are in memory.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        end, rest = os.fstat(file.fileno()).st_size, b""
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
            rest, end = rest if len(rest) <= _BLOCK else b"", start
        yield rest


def ensure_fits_memory(size: int) -> None:
    """Raises MemoryError for more bytes than this machine has. Where the kernel promises any amount
    (vm.overcommit_memory=1, as on the nodes of Kubernetes), a read does not fail, but has this
    process killed."""
    if size > physical_memory():
        raise MemoryError


def physical_memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fsync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_bytes(file: FileIO, data: bytes, *, durable: bool) -> None:
    """Appends all of ``data`` to an unbuffered file, and fsyncs it if ``durable``.

    On an OSError the file keeps its old content.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):  # an unbuffered file may write less than asked
            written += file.write(data[written:])
        if durable:
            os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def create(path: str | Path, *, dir_fd: int | None = None) -> int:
    """Opens a new file for writing. Removes what has the name, such as the file of a crash;
    never writes through a link."""
    with suppress(FileNotFoundError):
        os.unlink(path, dir_fd=dir_fd)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically and durably, through a temporary file beside it."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces a file atomically and durably once it is written; it is created
    beside it. After an error, the file stays."""
    temporary = path.with_name(f".{path.name}.new")
    with os.fdopen(create(temporary), "wb") as file:
        yield file
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """``replace_bytes`` for text, encoded as UTF-8."""
    replace_bytes(path, text.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``replace_bytes`` for a JSON object, indented by one space."""
    replace_text(path, json.dumps(values, indent=1) + "\n")
