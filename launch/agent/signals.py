"""Signals sent to the agent: recorded here, forwarded to the ranks when there are any."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType

from launch.contract import TERMINATING, handled_signals, unblock_stop_signals


class StopSignal(BaseException):  # not caught by the modules that are imported meanwhile
    """A signal that arrived while there were no ranks to forward it to."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """Records signals. SIGHUP and SIGQUIT are forwarded as SIGTERM, all others as they are.

    Each is forwarded once, however often it arrives: a rank that already stops needs no second
    one, and a rank that has removed its handler would die of it. A second SIGINT is forwarded: it
    is a person's second Ctrl-C, which means at once.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.stop_asked: float | None = None
        """The monotonic time of the first SIGTERM; the launcher kills this agent a while later."""
        self.interruptible: Callable[[], bool] = lambda: True
        """Whether a signal that arrives now raises StopSignal in the main thread."""
        self.forwarded: set[int] = set()
        """The signals that were returned by ``take``."""
        self._waiting: list[signal.Signals] = []
        self._seen: set[signal.Signals] = set()

    def install(self) -> None:
        """Installs the handlers. A program that nohup started keeps running after SIGHUP."""
        for number in handled_signals():
            signal.signal(number, self._record)
        unblock_stop_signals()

    def _record(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        forwarded = signal.SIGTERM if received in TERMINATING else received
        if forwarded == signal.SIGTERM and self.stop_asked is None:
            self.stop_asked = time.monotonic()
        if forwarded not in self._seen or forwarded == signal.SIGINT:
            self._seen.add(forwarded)
            self._waiting.append(forwarded)
        self.first = self.first or forwarded
        if self.interruptible():
            raise StopSignal(forwarded)

    def take(self) -> Iterable[signal.Signals]:
        """The signals to forward now; each is returned once."""
        taken, self._waiting = self._waiting, []
        self.forwarded.update(taken)
        return taken
