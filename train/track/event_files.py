"""TensorBoard's event files: one per attempt, in an order that shows each step once."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from train.files import append_bytes, create, open_regular, replacing

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*")
_HEADER = struct.Struct("<QI")  # length of the record, and its checksum
_FOOTER = 4  # bytes of the checksum after a record


class EventFile:
    """A new event file. A TensorBoard that runs hides what it has read from the step ``purge`` on.

    TensorBoard reads the files in the order of their names, so the name comes after those of
    earlier attempts, also if they ran on a host whose clock is ahead. Each event is in the file
    when ``write`` returns. Raises OSError.
    """

    def __init__(self, directory: Path, purge: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        newest = max((int(_time_of(path)) for path in event_files(directory)), default=-1)
        seconds = max(int(time.time()), newest + 1)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = FileIO(create(directory / name), "wb")
        self._records: Any = RecordWriter(_Appending(self._file))
        self._event: Any = Event
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge, session_log=start))

    def write(self, step: int, summary: Any, wall_time: float | None) -> None:
        """Writes a Summary. ``wall_time``: seconds since the epoch; None for now."""
        self._write(self._event(step=step, summary=summary, wall_time=wall_time or time.time()))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Appending:
    """A file in which each write is whole or absent."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        append_bytes(self._file, data, durable=False)


def event_files(directory: Path) -> list[Path]:
    """The event files of a directory, in the order in which TensorBoard reads them."""
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def remove_from(directory: Path, step: int) -> dict[int, set[str]]:
    """Removes the events from a step on, and what is cut off or damaged at the end of a file.
    Returns the tags at step 0 and at the step before, where there are any.

    TensorBoard's own purging is not enough: not all of its readers hide texts. Raises OSError.
    """
    for left in directory.glob(".events.out.tfevents.*.new"):
        left.unlink()  # by an attempt that was killed here; TensorBoard would read it
    tags: dict[int, set[str]] = {}
    for path in event_files(directory):
        kept: list[tuple[int, int]] = []
        for begin, end, event in _events(path):
            if event.HasField("file_version") or event.step < step:
                kept.append((begin, end))
                if event.step in (0, step - 1):
                    found = {value.tag for value in event.summary.value}
                    tags.setdefault(event.step, set()).update(found)
        if sum(after - before for before, after in kept) < path.stat().st_size:
            _keep(path, kept)
    return tags


def _keep(path: Path, parts: list[tuple[int, int]]) -> None:
    """Replaces a file, atomically, by these parts of it."""
    with os.fdopen(open_regular(path), "rb") as old, replacing(path) as new:
        for begin, end in parts:
            old.seek(begin)
            new.write(old.read(end - begin))


def _time_of(path: Path) -> str:
    found = _NAME.fullmatch(path.name)
    assert found
    return found[1]


def _events(path: Path) -> Iterator[tuple[int, int, Any]]:
    """The events of a file with the bytes where they begin and end, up to the first that is cut off
    or damaged. Checksums are not compared: that would take minutes for many histograms."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = 0
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            end = begin + _HEADER.size + length + _FOOTER
            if end > size:
                return
            try:
                event = Event.FromString(file.read(length))
            except DecodeError:
                return
            yield begin, end, event
            file.seek(end)
            begin = end
