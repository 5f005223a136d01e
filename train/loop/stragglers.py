"""Names ranks that are much slower than the others, so that all ranks wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

FACTOR, SECONDS = 2.0, 0.02
"""A straggler takes this many times the median of all ranks, and this many seconds per step more
than the median."""
IN_A_ROW, MUTED = 3, 100
"""A rank is named after this many log lines in a row, and then not again for this many."""


class Stragglers:
    """Compares the time that each rank of ``hosts`` (by rank) takes without waiting."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._comparisons = 0
        self._in_a_row: dict[int, int] = {}
        self._named_at: dict[int, int] = {}

    def compare(self, seconds: Sequence[Sequence[float]]) -> list[str]:
        """Warnings about ranks that have become stragglers; called with each log line.

        ``seconds`` has, for each rank, the seconds per step for data and for forward passes.
        """
        totals = [sum(own) for own in seconds]
        median = median_low(totals)  # of two ranks, the faster
        self._comparisons += 1
        self._in_a_row = {
            rank: self._in_a_row.get(rank, 0) + 1
            for rank, total in enumerate(totals)
            if total > FACTOR * median and total - median > SECONDS
        }
        named = [
            rank
            for rank, times in self._in_a_row.items()
            if times >= IN_A_ROW and self._comparisons - self._named_at.get(rank, -MUTED) >= MUTED
        ]
        self._named_at |= dict.fromkeys(named, self._comparisons)
        return [
            f"Rank {rank} ({self._hosts[rank]}) slows down the others: per step it takes "
            f"{seconds[rank][0]:.3f} s to load data and {seconds[rank][1]:.3f} s for forward "
            f"passes, where the median of all ranks is {median:.3f} s for both."
            for rank in named
        ]
