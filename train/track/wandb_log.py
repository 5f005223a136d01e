"""Reads the transaction logs that W&B keeps of each attempt, ``wandb/*run-*/run-ID.wandb``.

They are W&B's own account of what it will upload, or has uploaded: a row that is in none of them
was lost with the process. A log is a LevelDB log behind a header of 7 bytes (":W&B", a magic
number, a version): blocks of 32 KiB that hold fragments, each with a header of CRC-32 (4 bytes;
zlib's, where LevelDB has a masked CRC-32C), length (2) and type (1: whole, 2: first, 3: middle,
4: last), little-endian. The fragments joined are protobuf messages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from train.files import open_regular, read_bytes
from train.json_files import LARGEST

T = TypeVar("T")
_BLOCK, _HEADER, _START = 32 * 1024, struct.Struct("<IHB"), 7
_WHOLE, _FIRST, _LAST = 1, 2, 4
_UPLOADED = re.compile(rb"up to step (\d{1,18})\.")
_LARGEST = 64 << 20
"""The largest message in bytes; one that is larger is damage."""


def transaction_logs(run_directory: Path) -> list[Path]:
    """The logs of all attempts, in order of their start; those of offline and of online ones."""
    found = [
        path
        for pattern in ("offline-run-*", "run-*")
        for path in (run_directory / "wandb").glob(f"{pattern}/*.wandb")
        if not path.parent.is_symlink()
    ]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def is_offline(log: Path) -> bool:
    """Whether W&B has not uploaded the attempt while it ran."""
    return log.parent.name.startswith("offline-")


def remove_unrecorded(run_directory: Path) -> None:
    """Removes what attempts have left that were killed before W&B recorded the run. It has nothing
    of them, but ``wandb sync`` refuses all logs if one of them is such."""
    for log in transaction_logs(run_directory):
        if is_offline(log) and not has_run(log):
            shutil.rmtree(log.parent)


def synced_marker(log: Path) -> Path:
    """The file that W&B makes beside a log once it has uploaded it."""
    return log.with_suffix(".wandb.synced")


def mark_uploaded(log: Path, step: int) -> None:
    """Records that W&B has the rows of a log up to a step, and gets no others of it: later ones
    were not committed."""
    synced_marker(log).write_text(f"W&B has its rows up to step {step}.\n")


def uploaded_value(log: Path, name: str) -> int | None:
    """``last_value`` of the rows of a log that W&B has, or gets when the log is uploaded."""
    marked = None
    with suppress(OSError):
        marked = _UPLOADED.search(read_bytes(synced_marker(log), 1000))
    return last_value(log, name, int(marked[1]) if marked else LARGEST)


def messages(data: bytes, *, at: int = _START, growing: bool = True) -> Iterator[bytes]:
    """The messages of a log, or of a part of it that starts at a multiple of the block size: the
    end of a message that begins before is left out. With ``growing``, ends silently at the first
    fragment that is cut off or damaged, as a killed process leaves it. Else raises ValueError.
    """
    joined: bytes | None = None
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # padding at the end of a block
            at += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        part = data[start : start + length]
        if len(part) < length or checksum != zlib.crc32(bytes([kind]) + part):
            if growing:
                return
            raise ValueError(f"the record at byte {at} is cut off or damaged")
        if kind in (_WHOLE, _FIRST):
            joined = part
        elif joined is not None:
            joined = joined + part if len(joined) < _LARGEST else None
        if kind in (_WHOLE, _LAST) and joined is not None:
            yield joined
            joined = None
        at = start + length


def first_step(log: Path) -> int | None:
    """The ``step`` of the first row in a log; None if it has none."""
    return _first(log, partial(column, name="step"))


def has_run(log: Path) -> bool:
    """Whether a log has the record of the run, without which W&B takes nothing of it: a process
    that was killed before has left none."""

    def found(message: bytes) -> bool | None:
        record = _record(message)
        return True if record is not None and record.HasField("run") else None

    return _first(log, found) is not None


def _first(log: Path, found: Callable[[bytes], T | None]) -> T | None:
    """What ``found`` returns for the first message of a log for which that is not None."""
    with os.fdopen(open_regular(log), "rb") as file:
        size = _BLOCK
        while True:
            file.seek(0)
            data = file.read(size)
            for message in messages(data):
                if (value := found(message)) is not None:
                    return value
            if len(data) < size:
                return None
            size *= 8


def last_value(log: Path, name: str, until: int = LARGEST) -> int | None:
    """The largest value of a column of the rows in a log that cannot decrease, such as ``step``, up
    to a step; None if the last rows have none. Reads from the end, as far as needed to find a
    row."""
    with os.fdopen(open_regular(log), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        blocks = 1
        while True:
            begin = max(0, (size - 1) // _BLOCK + 1 - blocks) * _BLOCK
            file.seek(begin)
            data = file.read(size - begin)
            has_row, values = False, []
            for message in messages(data, at=0 if begin else _START):
                step = column(message, "step")
                if step is not None and step <= until:
                    has_row = True
                    values.append(column(message, name))
            if has_row or not begin:
                return max((value for value in values if value is not None), default=None)
            blocks *= 8


def column(message: bytes, name: str) -> int | None:
    """An integer in a column of a row of the history; None for any other message or value."""
    record = _record(message)
    if record is None or not record.HasField("history"):
        return None
    for item in record.history.item:
        if (item.key or ".".join(item.nested_key)) == name:
            try:
                value = json.loads(item.value_json)
            except ValueError:
                return None
            return value if type(value) is int else None
    return None


def _record(message: bytes) -> Any:
    """W&B's record in a message; None if it is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    try:
        record.ParseFromString(message)
    except DecodeError:
        return None
    return record
