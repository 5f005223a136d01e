"""metrics.jsonl: the source of truth of what was measured. One row, one line, per step."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends rows {"step", "attempt", "time", name: value ...}; a value that is not finite is
    null, since JSON has no other word for it.

    Metrics of one step (training and evaluation) are joined in one row, which is written as soon
    as a later step begins. On opening, rows after ``start_step`` are removed: those steps never
    happened and will be taken again, so that no step appears twice. Rows that cannot be written
    (OSError) are kept, and written with the next that can.
    """

    def __init__(self, path: Path, *, start_step: int, attempt: int) -> None:
        self.attempt = attempt
        self.damaged = truncate_after(path, start_step)
        self._file = path.open("ab", buffering=0)
        self._row: dict[str, Any] = {}
        self._unwritten = b""  # whole lines
        self._lock = threading.Lock()  # flush comes from the thread that writes checkpoints

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of this step."""
        with self._lock:
            if self._row and self._row["step"] != step:
                self._end_row()
            if not self._row:
                self._row = {"step": step, "attempt": self.attempt, "time": time.time()}
            self._row |= {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            self._write()

    def passed(self, step: int) -> None:
        """The training has come to ``step``: rows of earlier ones are complete."""
        ended = bool(self._row) and self._row["step"] < step
        if ended or self._unwritten:
            with self._lock:
                if ended:
                    self._end_row()
                self._write()

    def flush(self, step: int) -> None:
        """Makes rows up to ``step`` durable; called before its checkpoint is committed."""
        with self._lock:
            if self._row and self._row["step"] <= step:
                self._end_row()
            self._write()
            os.fsync(self._file.fileno())

    def _end_row(self) -> None:
        if self._row:
            self._unwritten += json.dumps(self._row).encode() + b"\n"
            self._row = {}

    def _write(self) -> None:
        if not self._unwritten:
            return
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(self._unwritten):  # unbuffered files may write less than asked
                written += self._file.write(self._unwritten[written:])
        except OSError:
            self._file.truncate(end)
            raise
        self._unwritten = b""

    def close(self) -> None:
        """Writes what is left."""
        with self._lock, self._file:
            self._end_row()
            self._write()


def truncate_after(path: Path, step: int) -> int:
    """Removes rows of later steps and a torn last line, at once; lines that are no rows are
    moved to metrics.jsonl.damaged, and their number is returned."""
    if not path.exists():
        return 0
    kept, damaged = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            row_step = json.loads(line)["step"]
            if row_step <= step:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
        except (ValueError, TypeError, KeyError):
            torn = number == len(lines) - 1 and not line.endswith(b"\n")
            if not torn:
                damaged.append(line)
    if damaged:
        with path.with_name(path.name + ".damaged").open("ab") as file:
            file.writelines(damaged)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return len(damaged)
