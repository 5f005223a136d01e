"""Reads metrics.jsonl in bounded memory: a curve per metric, long ones reduced to buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train.json_files import is_count, is_number, json_lines
from train.runs.state import moment

BUCKETS = 1000
"""The most buckets of a curve. A bucket keeps its lowest and its highest point."""
CURVES = 120
"""The most metrics of a run that are read."""
JUMPS = 200
"""The most steps at which skipped steps are recorded."""
SKIPPED = "train/skipped_steps"
SPIKES = "train/spikes"
BOTH = "not finite, or spikes"
_NAME = 200  # characters
_NOT_METRICS = {"step", "attempt", "time"}


class Point(NamedTuple):
    """A value of a metric."""

    step: int
    time: float | None
    """Seconds since the epoch."""
    value: float | None
    """None where it was not finite."""


class Bucket(NamedTuple):
    """The points of some consecutive steps that are kept."""

    low: Point | None
    high: Point | None
    gap: Point | None
    """The first that was not finite."""

    def points(self) -> list[Point]:
        """In the order of their steps, each once."""
        kept = {point.step: point for point in self if point is not None}
        return [kept[step] for step in sorted(kept)]

    def spans(self, value: float) -> bool:
        """Whether neither its lowest nor its highest point would become one with this value."""
        if self.low is None or self.high is None:
            return False
        return (self.low.value or 0.0) <= value <= (self.high.value or 0.0)

    def joined(self, other: Bucket) -> Bucket:
        """The bucket of both, of which ``other`` is the later."""
        return Bucket(
            _lower(self.low, other.low), _higher(self.high, other.high), self.gap or other.gap
        )


def _lower(first: Point | None, second: Point | None) -> Point | None:
    if first is None or second is None:
        return first or second
    return second if (second.value or 0.0) < (first.value or 0.0) else first


def _higher(first: Point | None, second: Point | None) -> Point | None:
    if first is None or second is None:
        return first or second
    return second if (second.value or 0.0) > (first.value or 0.0) else first


class Curve:
    """A metric over a run, of any length. Buckets become wider as the curve becomes longer."""

    def __init__(self) -> None:
        self.width = 1
        """Steps of a bucket. With 1, no point is left out."""
        self.count = 0
        """Values read."""
        self.not_finite = 0
        self.first: Point | None = None
        self.last: Point | None = None
        """The last finite point, like ``first``, ``low`` and ``high``."""
        self.low: Point | None = None
        self.high: Point | None = None
        self._buckets: dict[int, Bucket] = {}

    def add(self, point: Point) -> None:
        """Adds the value of a later step."""
        self.count += 1
        key = point.step // self.width
        bucket = self._buckets.get(key)
        if point.value is None:
            self.not_finite += 1
            new = Bucket(None, None, point)
        else:
            self.first, self.last = self.first or point, point
            if bucket and bucket.spans(point.value):
                return  # most points of a long curve
            new = Bucket(point, point, None)
            self.low, self.high = _lower(self.low, point), _higher(self.high, point)
        self._buckets[key] = bucket.joined(new) if bucket else new
        while len(self._buckets) > BUCKETS:
            self._widen()

    def _widen(self) -> None:
        self.width *= 2
        wider: dict[int, Bucket] = {}
        for key, bucket in self._buckets.items():
            wider[key // 2] = wider[key // 2].joined(bucket) if key // 2 in wider else bucket
        self._buckets = wider

    def reduce(self, points: int) -> None:
        """Widens the buckets until at most ``points`` points are kept."""
        while len(self._buckets) > 1 and len(self.points()) > points:
            self._widen()

    def points(self) -> list[Point]:
        """What is kept, in the order of steps: all points of a short curve, else the lowest and
        the highest of each bucket."""
        return [point for bucket in self._buckets.values() for point in bucket.points()]


@dataclass
class Metrics:
    """What metrics.jsonl says."""

    curves: dict[str, Curve] = field(default_factory=dict)
    rows: int = 0
    damaged: int = 0
    """Lines that are no rows."""
    left_out: int = 0
    """Names of metrics beyond ``CURVES``."""
    last: Point | None = None
    """The last step and its time; its value is None."""
    attempts: dict[int, tuple[Point, Point]] = field(default_factory=dict)
    """The first and the last row of each attempt; their values are None."""
    skipped: list[tuple[int, float | None, int, str]] = field(default_factory=list)
    """Step, time and number of steps that were skipped since the row before, and why."""


def read_metrics(path: Path) -> Metrics:
    """Reads the rows of a file; none where there is no file. Raises OSError."""
    found = Metrics()
    skipped, spikes, unknown = 0.0, 0.0, set[str]()
    for step, row in _rows(path, found):
        time = moment(row.get("time"))
        here = Point(step, time, None)
        found.rows, found.last = found.rows + 1, here
        attempt = row.get("attempt")
        if is_count(attempt) and (attempt in found.attempts or len(found.attempts) < 10_000):
            found.attempts[attempt] = (found.attempts.get(attempt, (here, here))[0], here)
        for name, value in row.items():
            if name in _NOT_METRICS or not (value is None or is_number(value)):
                continue
            curve = found.curves.get(name)
            if curve is None:
                if len(found.curves) >= CURVES or len(name) > _NAME:
                    if len(unknown) < 10_000:
                        unknown.add(name[:_NAME])
                    continue
                curve = found.curves[name] = Curve()
            number = float("nan") if value is None else float(value)
            curve.add(Point(step, time, number if math.isfinite(number) else None))
        total = row.get(SKIPPED)
        if is_number(total) and math.isfinite(total):
            before, spikes = spikes, row[SPIKES] if is_number(row.get(SPIKES)) else spikes
            if total > skipped and len(found.skipped) < JUMPS:
                new = spikes - before
                why = "not finite" if new <= 0 else "spikes" if new >= total - skipped else BOTH
                found.skipped.append((step, time, int(total - skipped), why))
            skipped = total
    found.left_out = len(unknown)
    return found


def _rows(path: Path, found: Metrics) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.exists():
        return
    before = -1
    for line, row in json_lines(path):
        step = None if row is None else row.get("step")
        if row is None or not is_count(step) or step < before:
            # The last line may be one that the run is writing.
            found.damaged += line.endswith(b"\n")
            continue
        before = step
        yield step, row
