"""Ends the process from a thread, without the main thread, which may be blocked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

from train.exits import Exit

_T = TypeVar("_T")
_SECONDS = 1.0  # for the record


class AbruptEnd:
    """The end of a process by ``os._exit``, recorded where that does not take long."""

    def __init__(self) -> None:
        self._record: Callable[[Exit, str], None] | None = None
        self.begun = False
        """Whether it ends the process now: what the main thread reports until then is a
        consequence."""

    def record_by(self, record: Callable[[Exit, str], None] | None) -> None:
        """From now on, ``record`` is called with the exit code and the reason; None ends that. It
        may block, for instance on a disk that does not answer."""
        self._record = record

    def end(self, code: Exit, reason: str) -> NoReturn:
        """Ends the process with this code, at most 1 s later. Incomplete files have temporary names
        and are removed at the next start."""
        self.begun = True
        if record := self._record:
            within(_SECONDS, lambda: record(code, reason))
        os._exit(code)


def within(seconds: float, call: Callable[[], _T]) -> _T | None:
    """What ``call`` returns, called in a thread; None if it raises, or takes longer."""
    results: list[_T] = []

    def run() -> None:
        with suppress(Exception):  # the process ends anyway
            results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
