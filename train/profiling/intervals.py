"""Sets of moments, as sorted lists of intervals (start, end) that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(parts: Iterable[tuple[float, float]]) -> Intervals:
    """All moments of the parts, in any order and overlapping."""
    found: Intervals = []
    for start, end in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


def intersection(one: Intervals, other: Intervals) -> Intervals:
    """The moments in both."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > start:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(one: Intervals, other: Intervals) -> Intervals:
    """The moments in the first that are not in the other."""
    gaps, at = [], float("-inf")
    for start, end in other:
        gaps.append((at, start))
        at = end
    return intersection(one, [*gaps, (at, float("inf"))])


def length(parts: Intervals) -> float:
    """The time in all of them."""
    return sum(end - start for start, end in parts)
