"""Stores the code of a run on the volume with the runs; runs in a pod that is made for it.

It is sent to the pod, so it may use only Python's standard library. Arguments: ``has`` or
``receive``, the path of the archive, its digest and its size in bytes. What is received comes
from standard input.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

KEPT_DAYS = 30
"""An archive is removed when no pod has used it for so long."""
_BLOCK = 1 << 20
_ARCHIVE = re.compile(r"[0-9a-f]{64}\.tar\.gz")
_DAY = 86400
_OLDEST = {"archive": KEPT_DAYS * _DAY, "half": _DAY}


def has(archive: Path, digest: str) -> bool:
    """Whether the archive is there and undamaged; if so, it counts as used now."""
    try:
        with suppress(PermissionError):  # it belongs to another user
            os.utime(archive)  # before it is read, so that nobody removes it from now on
        return _digest_of(archive) == digest
    except FileNotFoundError:
        return False


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def receive(source: BinaryIO, archive: Path, digest: str, size: int) -> str:
    """Writes the archive: whole, or not at all. Returns an error, or an empty text."""
    folder = archive.parent
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        return f"{folder} is a link, which could lead anywhere; remove it."
    _remove_unused(folder)
    half = folder / f"{archive.name}.{secrets.token_hex(4)}.half"
    found, left = hashlib.sha256(), size
    try:
        with half.open("xb") as file:
            while left and (block := source.read(min(left, _BLOCK))):
                found.update(block)
                file.write(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
        if left or f"sha256:{found.hexdigest()}" != digest:
            return f"The code arrived damaged; {left:,} of its {size:,} bytes are missing."
        half.replace(archive)
    finally:
        half.unlink(missing_ok=True)
    return ""


def _remove_unused(folder: Path) -> None:
    """Removes archives that no run has used for long, and what interrupted uploads have left."""
    for path in folder.iterdir():
        kind = "half" if path.suffix == ".half" else "archive"
        if kind == "archive" and not _ARCHIVE.fullmatch(path.name):
            continue
        with suppress(OSError):
            if _is_older(path, _OLDEST[kind]):
                # Under another name: a launch that finds it used from now on has it back.
                moved = path.with_name(f"{path.name}.{secrets.token_hex(4)}.half")
                path.rename(moved)
                if _is_older(moved, _OLDEST[kind]):
                    moved.unlink()
                else:
                    moved.rename(path)


def _is_older(path: Path, seconds: float) -> bool:
    return time.time() - path.lstat().st_mtime > seconds


def main(words: list[str]) -> int:
    """Answers ``has`` with yes or no, or receives; returns the exit code."""
    action, path, digest, size = words
    archive = Path(path)
    try:
        if action == "has":
            print("yes" if has(archive, digest) else "no")
            return 0
        error = receive(sys.stdin.buffer, archive, digest, int(size))
    except OSError as failed:
        error = (
            f"The code cannot be stored in {archive.parent} on the volume with the runs "
            f"({failed.strerror}); make room there, or let its user write to it."
        )
    if error:
        print(f"isorun: error: {error}", file=sys.stderr)
    return 75 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[-4:]))
