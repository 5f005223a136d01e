"""Names ranks that take much longer than the others, for which all have to wait."""

from __future__ import annotations

from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.loop.run import Run

FACTOR, SECONDS = 2.0, 0.02
"""A straggler takes so many times the median of all ranks, and so much longer per step."""
TIMES, MUTED = 3, 100
"""It is named when it was one in so many looks in a row, and then not again for so many."""


class Stragglers:
    """Compares what ranks take by themselves."""

    def __init__(self) -> None:
        self._looks = 0
        self._in_a_row: dict[int, int] = {}
        self._told_at: dict[int, int] = {}

    def look(self, run: Run) -> list[str]:
        """Sentences about ranks that have begun to lag; collective, with each log line."""
        if run.engine.world_size == 1:
            return []
        everyone = run.engine.gather_floats(run.window.own_seconds)
        totals = [sum(own) for own in everyone]
        usual = median_low(totals)  # of two, the faster
        self._looks += 1
        self._in_a_row = {
            rank: self._in_a_row.get(rank, 0) + 1
            for rank, total in enumerate(totals)
            if total > FACTOR * usual and total - usual > SECONDS
        }
        named = [
            rank
            for rank, times in self._in_a_row.items()
            if times >= TIMES and self._looks - self._told_at.get(rank, -MUTED) >= MUTED
        ]
        self._told_at |= dict.fromkeys(named, self._looks)
        return [
            f"Rank {rank} ({run.hosts[rank]}) holds up the others: per step it takes "
            f"{everyone[rank][0]:.3f} s to load data and {everyone[rank][1]:.3f} s for forward "
            f"passes, where the median of all ranks is {usual:.3f} s together."
            for rank in named
        ]
