"""Signals that reach the agent: noted here, passed on to the ranks where they can be."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType

# What asks for an end. SIGHUP is a terminal that closes, SIGQUIT a person at one.
TERMINATING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
HANDLED = (*TERMINATING, signal.SIGINT, signal.SIGUSR1)


class StopSignal(Exception):  # noqa: N818 - a request, no error
    """A signal that came while there were no ranks to pass it on to."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """Notes signals. SIGTERM is passed on once, whoever repeats it: a rank that is told again
    learns nothing, and one that is no longer listening would die of it. A second SIGINT is a
    person's, who means it: at once."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.interruptible = True
        """Whether a signal may raise StopSignal where the main thread is."""
        self._waiting: list[signal.Signals] = []
        self._seen: set[signal.Signals] = set()

    def install(self) -> None:
        """Takes the handlers."""
        for number in HANDLED:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        passed_on = signal.SIGTERM if received in TERMINATING else received
        if passed_on not in self._seen or passed_on == signal.SIGINT:
            self._seen.add(passed_on)
            self._waiting.append(passed_on)
        self.first = self.first or passed_on
        if self.interruptible:
            raise StopSignal(passed_on)

    def take(self) -> Iterable[signal.Signals]:
        """What is to be passed on, each once."""
        taken, self._waiting = self._waiting, []
        return taken
