"""Writes goodput.jsonl: where the time of each attempt went.

A line has the seconds of each phase since the start of its attempt, so that only the last line of
an attempt counts, and a line that cannot be written is not missed. A thread writes the lines: at
each checkpoint and evaluation, and every few seconds, so that a kill loses little. The loop never
waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from train.files import append_bytes, open_regular
from train.goodput.clock import PhaseClock
from train.goodput.phases import RECORDED, WORK, Phase, flush_interval
from train.goodput.read import FILE, Goodput, read_goodput

_log = logging.getLogger("train")
_MOST_SAVES = 1000  # that a line has, after a long time in which none could be written


class GoodputLedger:
    """The ledger of one attempt. All methods do nothing until ``open``, which only rank 0 calls.

    Without ``in_background`` there is no thread: only ``write`` and ``close`` write lines.
    """

    def __init__(self, clock: PhaseClock, *, in_background: bool = True) -> None:
        self.clock, self._in_background = clock, in_background
        self.steps: Callable[[], tuple[int, int]] | None = None
        """Returns the completed steps, and the step of the newest committed checkpoint (0 without
        one); called in the ledger's thread."""
        self._directory: Path | None = None
        self._file: FileIO | None = None
        self._saves: list[list[float]] = []
        self._writing = threading.Lock()  # never taken by the loop: a disk may not answer
        self._wake = threading.Event()
        self._closing = self._has_failed = False
        self._exit: int | None = None
        self._thread = threading.Thread(target=self._write_lines, name="goodput", daemon=True)

    def open(self, directory: Path, attempt: int, resumed: int) -> None:
        """Starts to write to the run directory; the attempt resumes after ``resumed`` steps.

        Raises OSError for a file that cannot be opened, such as a symbolic link.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = FileIO(open_regular(directory / FILE, flags), "ab+")
        self._directory, self._attempt, self._resumed = directory, attempt, resumed
        self.write()
        if self._in_background:
            self._thread.start()

    def saving(self, step: int) -> None:
        """A checkpoint of ``step`` is started: what was done until now is lost only if it is never
        committed."""
        if self._file is not None:
            seconds = _recorded(self.clock)
            self._saves.append([step, *(seconds.get(phase, 0.0) for phase in WORK)])
            self.flush_soon()

    def flush_soon(self) -> None:
        """Has a line written now, without waiting for it."""
        self._wake.set()

    def ended(self, code: int) -> None:
        """The exit code of the attempt, for its last line."""
        self._exit = int(code)

    def so_far(self) -> Goodput | None:
        """The times of all attempts up to now; None where they cannot be read."""
        if self._directory is None:
            return None
        self.write()
        try:
            return read_goodput(self._directory)
        except OSError:
            return None

    def close(self) -> None:
        """Writes the last line, durably."""
        if self._file is None:
            return
        self._closing = True
        self._wake.set()
        if self._in_background:
            self._thread.join(5.0)  # a file system that does not answer must not delay the end
        if not self._thread.is_alive():
            self.write(durable=True)
            self._file.close()
            self._file = None

    def _write_lines(self) -> None:
        while not self._closing:
            self._wake.wait(flush_interval(self.clock.elapsed))
            self._wake.clear()
            if not self._closing:
                self.write()

    def write(self, *, durable: bool = False) -> None:
        """Writes a line now. What cannot be written is written with the next one."""
        with self._writing:
            file = self._file
            assert file is not None
            saves = list(self._saves)
            try:
                line = json.dumps(self._line(saves), separators=(",", ":")).encode() + b"\n"
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line  # a crash cut off the last line
                append_bytes(file, line, durable=durable)
            except OSError as error:
                if not self._has_failed:
                    _log.warning("goodput.jsonl cannot be written (%s); trying again", error)
                self._has_failed = True
                del self._saves[:-_MOST_SAVES]
            else:
                self._has_failed = False
                del self._saves[: len(saves)]

    def _line(self, saves: list[list[float]]) -> dict[str, Any]:
        step, committed = self.steps() if self.steps else (self._resumed, self._resumed)
        line: dict[str, Any] = {
            "attempt": self._attempt,
            "started": self.clock.started_at,
            "resumed": self._resumed,
            "step": step,
            "committed": committed,
            "seconds": {k: round(v, 4) for k, v in _recorded(self.clock).items()},
        }
        if self.clock.submitted_at is not None:
            line["submitted"] = self.clock.submitted_at
        if saves:
            line["saves"] = [[round(value, 4) for value in save] for save in saves]
        if self._closing and self._exit is not None:
            line["exit"] = self._exit
        return line


def _recorded(clock: PhaseClock) -> dict[str, float]:
    """The seconds of the phases that the ledger has."""
    totals = clock.totals()
    forward: Phase = "forward"
    totals["compute"] = totals.get("compute", 0.0) + totals.pop(forward, 0.0)
    return {phase: totals[phase] for phase in RECORDED if phase in totals}
