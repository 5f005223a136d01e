"""events.jsonl: what happened in a run, over all attempts.

A sink may lose an event with its process, or have no place for it: W&B takes no further row of a
step that it has. Each event is therefore in this file before a sink gets it, and the next attempt
reads here what a sink lacks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from train.files import append_bytes, lines_backwards, open_regular
from train.json_files import has_fields, is_count, is_number, json_lines, parse_object

EVENTS = "events.jsonl"
_SECOND = 1000  # milliseconds


class Event(NamedTuple):
    """A sentence about what happened in a run."""

    attempt: int
    step: int
    """The step that the attempt had reached."""
    time: int | None
    """Milliseconds since the epoch, later than those of all earlier events of the run; None for a
    start that was not logged."""
    text: str

    @property
    def seconds(self) -> float | None:
        """The time in seconds since the epoch."""
        return None if self.time is None else self.time / _SECOND


class EventLog:
    """Appends events. May be used in any thread. Raises OSError."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._attempt = attempt
        self._file = FileIO(open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab")
        self._last = max((event.time or 0 for event in _last_event(path)), default=0)
        self._lock = threading.Lock()
        size = os.fstat(self._file.fileno()).st_size
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":  # cut off by a crash
            append_bytes(self._file, b"\n", durable=False)

    def append(self, step: int, text: str) -> Event:
        """Adds an event, now."""
        with self._lock:
            # A clock may go back, or be another machine's; two events may have the same time.
            self._last = max(round(time.time() * _SECOND), self._last + 1)
            event = Event(self._attempt, step, self._last, text)
            line = {**event._asdict(), "time": event.seconds}
            append_bytes(self._file, json.dumps(line).encode() + b"\n", durable=False)
            return event

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def start_text(attempt: int, step: int) -> str:
    """How the event of an attempt that resumes begins."""
    return f"Attempt {attempt} starts after step {step}"


def events_until(directory: Path, attempt: int) -> Iterator[Event]:
    """The events of a run directory of the attempts up to this one, in order, with the starts of
    those that were killed before they logged it. Lines that are not events are left out."""
    from train.data.ledger import attempt_starts

    logged: list[Event] = []
    with suppress(OSError):  # without the file, or if it is a link
        rows = (_event(row) for _, row in json_lines(directory / EVENTS))
        logged = [event for event in rows if event and event.attempt <= attempt]
    starts = {e.attempt for e in logged if e.text.startswith(start_text(e.attempt, e.step))}
    missing = [
        Event(n, step, None, f"{start_text(n, step)}.")
        for n, step in attempt_starts(directory / "ledger.bin").items()
        if 1 < n <= attempt and n not in starts
    ]
    # The order within an attempt stays, behind its start.
    yield from sorted([*missing, *logged], key=lambda event: event.attempt)


def milliseconds(seconds: float | None) -> int | None:
    """The ``time`` of an event from that of its line."""
    return None if seconds is None else round(seconds * _SECOND)


def _last_event(path: Path) -> Iterator[Event]:
    """The last event of the file, if it has one."""
    for line in lines_backwards(path):
        try:
            event = _event(parse_object(line))
        except ValueError:
            continue
        if event:
            yield event
            return


def _event(row: object) -> Event | None:
    if not has_fields(row, {"attempt": int, "step": int, "time": (int, float), "text": str}):
        return None
    if not (is_count(row["attempt"]) and is_count(row["step"]) and is_number(row["time"])):
        return None
    if not 0 <= row["time"] < 1e12:
        return None
    return Event(row["attempt"], row["step"], milliseconds(row["time"]), row["text"])
