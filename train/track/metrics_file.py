"""metrics.jsonl: all metrics, one row per step."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from train.files import (
    TooLargeError,
    append_bytes,
    open_regular,
    read_bytes,
    replace_bytes,
    replacing,
)
from train.json_files import LIMIT, has_fields, json_lines


class MetricsFile:
    """Appends rows {"step", "attempt", "time", name: value ...}; a non-finite value is null.

    Metrics of one step (training and evaluation) are merged into one row, which is written when a
    later step begins; later metrics of that step are merged into the row on disk. Opening removes
    the rows after ``start_step``, which the attempt repeats, so that no step occurs twice. Rows
    that cannot be written (OSError) are kept and written with the next row.
    """

    def __init__(self, path: Path, *, start_step: int, attempt: int) -> None:
        self.path, self.attempt = path, attempt
        self.damaged, self._last = remove_rows_after(path, start_step)
        self._file = _opened(path)
        self._row: dict[str, Any] = {}
        self._unwritten = b""  # complete lines
        self._replaces_last = False  # whether the first of them replaces the last line on disk
        self._lock = threading.Lock()  # flush is called in the thread that writes checkpoints

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of this step."""
        with self._lock:
            if self._row and self._row["step"] != step:
                self._end_row()
            if not self._row:
                self._row = {"step": step, "attempt": self.attempt, "time": time.time()}
            self._row |= {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            self._write()

    def advance(self, step: int) -> None:
        """Marks the rows before ``step`` as complete and writes them."""
        row = self._row  # read once: flush may replace it
        ended = bool(row) and row["step"] < step
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
        row, self._row = self._row, {}
        if not row:
            return
        if self._last.get("step") == row["step"]:
            # An attempt repeats an evaluation that was interrupted, or made before the first
            # checkpoint.
            row = self._last | row
            if self._unwritten:
                self._unwritten = b"".join(self._unwritten.splitlines(keepends=True)[:-1])
            else:
                self._replaces_last = True
        self._last = row
        self._unwritten += json.dumps(row).encode() + b"\n"

    def _write(self) -> None:
        if not self._unwritten:
            return
        if self._replaces_last:
            if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                raise FileNotFoundError(errno.ENOENT, "was moved or replaced", str(self.path))
            lines = read_bytes(self.path).splitlines(keepends=True)
            replace_bytes(self.path, b"".join([*lines[:-1], self._unwritten]))
            self._file.close()
            self._file = _opened(self.path)
            self._replaces_last = False
        else:
            append_bytes(self._file, self._unwritten, durable=False)
        self._unwritten = b""

    def close(self) -> None:
        """Writes the last row and closes the file."""
        with self._lock, self._file:
            self._end_row()
            self._write()


def _opened(path: Path) -> FileIO:
    """The file, open for appending; created where it does not exist."""
    return FileIO(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def remove_rows_after(path: Path, step: int) -> tuple[int, dict[str, Any]]:
    """Removes the rows after ``step`` and an incomplete last line, atomically.

    Lines that are not rows are moved to metrics.jsonl.damaged. Returns the number of those lines,
    and the last remaining row ({} if there is none). Raises TooLargeError for too many of those.
    """
    if not path.exists():
        return 0, {}
    damaged: list[bytes] = []
    last: dict[str, Any] = {}
    size = 0
    keeps = bytearray()  # per line; the lines themselves may not fit into memory
    line = b""
    for line, row in json_lines(path):
        keeps.append(False)
        if has_fields(row, {"step": int}):
            if row["step"] <= step:
                keeps[-1], last = True, row
            continue
        size += len(line)
        damaged.append(line)
        if size > LIMIT:
            text = f"more than {LIMIT:,} bytes of it are not rows"
            raise TooLargeError(errno.EFBIG, text, str(path))
    is_cut_off = bool(line) and not line.endswith(b"\n")
    if damaged and damaged[-1] is line and is_cut_off:
        del damaged[-1]  # by a crash
    if damaged:
        with _opened(path.with_name(path.name + ".damaged")) as file:
            append_bytes(file, b"".join(damaged), durable=False)
    if not all(keeps) or is_cut_off:
        _keep_lines(path, keeps)
    return len(damaged), last


def _keep_lines(path: Path, keeps: bytearray) -> None:
    """Replaces the file, atomically, by the lines whose number in ``keeps`` is not 0, each with its
    end."""
    with os.fdopen(open_regular(path), "rb") as old, replacing(path) as new:
        for keep in keeps:
            line = old.readline(LIMIT)  # as json_lines reads them
            if keep:
                new.write(line.rstrip(b"\n") + b"\n")
