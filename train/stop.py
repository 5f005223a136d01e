"""Requests to stop: signals are noted, and acted upon between two steps."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from train.exits import Exit

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            # Straight to the kernel: nothing after this may wait, hang or write. What is half
            # written bears a temporary name and is swept at the next start.
            _say(b"\nisorun: stopped at once, without saving.\n")
            os._exit(Exit.STOPPED_AT_ONCE)
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            _say(b"\nisorun: finishing the step and saving; Ctrl-C again stops at once.\n")


def _say(text: bytes) -> None:
    """Whoever reads our messages may have been stopped by the same Ctrl-C."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text)
