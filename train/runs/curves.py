"""The metrics of several runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.checkpoint.run_view import Run
from train.runs.tail import TRAINING_LOSS
from train.track.watched_metric import watched_metric

Curve = Mapping[int, float]
"""The values of a metric by step, ascending."""
Point = tuple[int, float]
"""A step and the value there."""
_SMALLEST = 1e-30
"""Relative differences are of at least this value."""


@dataclass(frozen=True)
class Metric:
    """One metric of several runs. None for a run that does not have it."""

    name: str
    final: list[Point | None]
    best: list[Point | None]
    """The best value; None for a metric of which it is not known whether less is better."""
    common_step: int | None
    """The last step at which all runs have it."""
    common: list[float | None]
    """The values at that step."""


@dataclass(frozen=True)
class Losses:
    """The training losses of several runs, compared with those of the first."""

    steps: int
    """Number of steps at which all runs logged the loss of the same steps."""
    first: int | None
    """The first of them at which a loss differs by more than the tolerance."""
    values: list[float]
    """The losses at that step."""
    largest: float
    """The largest relative difference; infinite where only one loss is finite."""
    largest_step: int | None


def curves(run: Run) -> dict[str, dict[int, float]]:
    """Each metric of a run by step."""
    return {
        name: dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for name, series in run.metrics.items()
        if name != "time"
    }


def directions(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics of which it is known whether less (min) or more (max) is better."""
    found = {TRAINING_LOSS: "min", "eval/loss": "min"}
    for run in runs:
        metric, mode = watched_metric(run.config)
        found[metric] = mode
    return found


def side_by_side(each: Sequence[Mapping[str, Curve]], modes: Mapping[str, str]) -> list[Metric]:
    """All metrics of several runs."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return [_metric(name, [metrics.get(name, {}) for metrics in each], modes) for name in names]


def _metric(name: str, each: Sequence[Curve], modes: Mapping[str, str]) -> Metric:
    shared = common_steps(each, windows=not name.startswith("eval/"))
    last = max(shared, default=None)
    return Metric(
        name,
        [max(curve.items(), default=None) for curve in each],
        [best(curve, modes.get(name)) for curve in each],
        last,
        [None if last is None else curve[last] for curve in each],
    )


def best(curve: Curve, mode: str | None) -> Point | None:
    """The first of the best finite values."""
    points = [point for point in curve.items() if math.isfinite(point[1])]
    if mode is None or not points:
        return None
    sign = -1.0 if mode == "max" else 1.0
    return min(points, key=lambda point: (sign * point[1], point[0]))


def common_steps(each: Sequence[Curve], *, windows: bool) -> list[int]:
    """The steps that all curves have. ``windows``: only those with the same step before, since a
    metric of the training is that of all steps since it was logged last."""

    def keys(curve: Curve) -> set[tuple[int | None, int]]:
        steps = sorted(curve)
        return set(zip([None, *steps] if windows else [None] * len(steps), steps, strict=False))

    return sorted(step for _, step in set.intersection(*map(keys, each)))


def compare_losses(each: Sequence[Curve], tolerance: float) -> Losses:
    """Where the losses of runs differ by more than a relative ``tolerance`` from the first."""
    steps = common_steps(each, windows=True)
    first: int | None = None
    largest, largest_step = 0.0, None
    for step in steps:
        found = max(relative(each[0][step], curve[step]) for curve in each[1:])
        if found > largest:
            largest, largest_step = found, step
        if first is None and found > tolerance:
            first = step
    values = [] if first is None else [curve[first] for curve in each]
    return Losses(len(steps), first, values, largest, largest_step)


def relative(expected: float, found: float) -> float:
    """The difference of two values relative to the first; 0 for two that are NaN, and infinite
    where only one is."""
    if expected == found or (math.isnan(expected) and math.isnan(found)):
        return 0.0
    if not (math.isfinite(expected) and math.isfinite(found)):
        return math.inf
    return abs(found - expected) / max(abs(expected), _SMALLEST)
