"""The clock of one process: each moment since its start belongs to one phase."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from train.goodput.phases import Phase
from train.numeric_text import finite_number

SUBMITTED_AT = "ISORUN_SUBMITTED_AT"
"""When a launcher submitted this start of the run: seconds since the epoch."""


class PhaseClock:
    """Adds up the seconds of each phase. A change of the phase costs one reading of a clock.

    Only the main thread changes the phase; any thread may call ``totals``. The process was started
    ``age`` seconds ago and ``submitted`` at that time, if it is known.
    """

    def __init__(
        self,
        *,
        age: float = 0.0,
        submitted: float | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        self._since = now()
        self._started = self._since - age
        self.started_at = wall() - age
        """Seconds since the epoch."""
        self.submitted_at = submitted
        self._phase: Phase = "start"
        self._seconds: dict[Phase, float] = {"start": age}
        self._counted_as: Mapping[Phase, Phase] = {}
        self.annotate: Callable[[Phase], AbstractContextManager[object]] | None = None
        """Marks the body of ``within`` for a profiler, while there is one."""

    @classmethod
    def of_process(cls) -> PhaseClock:
        """A clock that starts with this process, and knows when a launcher submitted it."""
        submitted = finite_number(os.environ.get(SUBMITTED_AT, ""))
        return cls(age=process_age(), submitted=submitted)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started

    def enter(self, phase: Phase) -> None:
        """What follows belongs to ``phase``."""
        now = self._now()
        seconds, before = self._seconds, self._phase
        seconds[before] = seconds.get(before, 0.0) + now - self._since
        self._since = now
        self._phase = self._counted_as.get(phase, phase)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """The body belongs to ``phase``, what follows to the phase before."""
        before = self._phase
        self.enter(phase)
        try:
            with self.annotate(phase) if self.annotate else nullcontext():
                yield
        finally:
            self.enter(before)

    @contextmanager
    def counted_as(self, phase: Phase) -> Iterator[None]:
        """Within the body, compute and forward passes belong to ``phase``."""
        before = self._phase
        self._counted_as = {"compute": phase, "forward": phase}
        self.enter(before)
        try:
            yield
        finally:
            self._counted_as = {}
            self.enter(before)

    def totals(self) -> dict[Phase, float]:
        """The seconds of each phase since the start, up to now; their sum is ``elapsed``."""
        # The open phase gets what the others leave, so that another thread needs no lock.
        seconds, phase = self._seconds.copy(), self._phase
        rest = self.elapsed - sum(seconds.values())
        seconds[phase] = seconds.get(phase, 0.0) + max(0.0, rest)
        return seconds


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        # The name of the program, in parentheses, may have blanks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    try:
        import psutil

        return max(0.0, time.time() - float(psutil.Process().create_time()))
    except Exception:  # psutil's own exceptions
        return 0.0
