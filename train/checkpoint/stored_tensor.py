"""The form of a stored tensor, checked before torch reads it.

A tensor is stored as ``torch.save`` writes it: a zip file without compression. With compression, a
few bytes could become more memory than there is.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

from train.checkpoint.damage import DamagedError
from train.files import open_regular

_LARGEST_READ = 1 << 17  # bytes; zipfile reads the list of entries at once


def check_tensors(checkpoint: Path, places: Iterable[tuple[str, int, int]]) -> None:
    """Raises DamagedError unless there is a zip file without compression at each place: a file of
    the checkpoint, the first byte, and the number of bytes. Raises OSError as well."""
    by_file: dict[str, set[tuple[int, int]]] = {}
    for name, at, length in places:
        by_file.setdefault(name, set()).add((at, length))
    for name, parts in by_file.items():
        with os.fdopen(open_regular(checkpoint / name), "rb") as file:
            for at, length in sorted(parts):
                if fault := zip_fault(file, at, length):
                    raise DamagedError(
                        f"A tensor of {checkpoint} cannot be read ({name} at byte {at}: {fault})"
                    )


def zip_fault(
    file: IO[bytes], at: int, length: int, largest_read: int = _LARGEST_READ
) -> str | None:
    """Why ``length`` bytes of a file from ``at`` on are not a zip file without compression whose
    list of entries has at most ``largest_read`` bytes; None where they are."""
    data = _Slice(file, at, length, largest_read)
    try:
        if data.read(4) != b"PK\x03\x04":
            return "it is not a zip file"
        entries = zipfile.ZipFile(cast(IO[bytes], data)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        return f"it is not a zip file ({error})"
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size > e.compress_size for e in entries):
        return "it is compressed"
    if sum(entry.file_size for entry in entries) > length:
        return "its entries are larger than it is"
    return None


class _Slice:
    """A part of a file, as much of a file as zipfile needs."""

    def __init__(self, file: IO[bytes], start: int, length: int, largest_read: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0
        self._largest_read = largest_read

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("it is too short")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        if size > self._largest_read:
            raise ValueError("it has too many entries")
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
