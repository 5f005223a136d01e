"""The metrics of several runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.checkpoint.run_view import Run, Series
from train.runs.tail import TRAINING_LOSS
from train.track.watched_metric import watched_metric

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


def curves(run: Run) -> dict[str, Series]:
    """Each metric of a run, with each step once."""
    return {name: _once(series) for name, series in run.metrics.items() if name != "time"}


def _once(series: Series) -> Series:
    """The series in the order of steps, with the last value of each: a damaged file may have
    others."""
    steps, values = series
    if (np.diff(steps) > 0).all():
        return series
    unique, last = np.unique(steps[::-1], return_index=True)
    return Series(unique, values[::-1][last])


def empty() -> Series:
    """The curve of a run that does not have a metric."""
    return Series(np.zeros(0, np.int64), np.zeros(0, np.float64))


def directions(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics of which it is known whether less (min) or more (max) is better."""
    found = {TRAINING_LOSS: "min", "eval/loss": "min"}
    for run in runs:
        metric, mode = watched_metric(run.config)
        found[metric] = mode
    return found


def side_by_side(each: Sequence[Mapping[str, Series]], modes: Mapping[str, str]) -> list[Metric]:
    """All metrics of several runs."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return [
        _metric(name, [metrics.get(name) or empty() for metrics in each], modes) for name in names
    ]


def _metric(name: str, each: Sequence[Series], modes: Mapping[str, str]) -> Metric:
    shared = common_steps(each, windows=not name.startswith("eval/"))[-1:]
    return Metric(
        name,
        [_point(curve, len(curve.steps) - 1) for curve in each],
        [best(curve, modes.get(name)) for curve in each],
        int(shared[0]) if len(shared) else None,
        [float(_at(curve, shared)[0]) if len(shared) else None for curve in each],
    )


def _point(curve: Series, index: int) -> Point | None:
    return (int(curve.steps[index]), float(curve.values[index])) if len(curve.steps) else None


def best(curve: Series, mode: str | None) -> Point | None:
    """The first of the best finite values."""
    is_finite = np.isfinite(curve.values)
    if mode is None or not is_finite.any():
        return None
    signed = -curve.values if mode == "max" else curve.values
    return _point(curve, int(np.argmin(np.where(is_finite, signed, np.inf))))


def common_steps(each: Sequence[Series], *, windows: bool) -> NDArray[np.int64]:
    """The steps that all curves have. ``windows``: only those with the same step before, since a
    metric of the training is that of all steps since it was logged last."""
    steps: NDArray[np.int64] = reduce(np.intersect1d, (curve.steps for curve in each))
    if windows:
        before = [np.append(-1, curve.steps)[np.searchsorted(curve.steps, steps)] for curve in each]
        steps = steps[np.all([found == before[0] for found in before], axis=0)]
    return steps


def _at(curve: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values at steps that the curve has."""
    values: NDArray[np.float64] = curve.values[np.searchsorted(curve.steps, steps)]
    return values


def compare_losses(each: Sequence[Series], tolerance: float) -> Losses:
    """Where the losses of runs differ by more than a relative ``tolerance`` from the first."""
    steps = common_steps(each, windows=True)
    expected, *others = (_at(curve, steps) for curve in each)
    found = np.max([relative(expected, values) for values in others], axis=0)
    above = np.flatnonzero(found > tolerance)
    largest = int(np.argmax(found)) if len(steps) and found.max() > 0 else None
    return Losses(
        len(steps),
        int(steps[above[0]]) if len(above) else None,
        [float(values[above[0]]) for values in (expected, *others)] if len(above) else [],
        0.0 if largest is None else float(found[largest]),
        None if largest is None else int(steps[largest]),
    )


def relative(expected: Any, found: Any) -> NDArray[np.float64]:
    """The differences of values relative to the first ones; 0 for two that are NaN, and infinite
    where only one is."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    is_same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    is_finite = np.isfinite(expected) & np.isfinite(found)
    with np.errstate(all="ignore"):
        differences = np.abs(found - expected) / np.maximum(np.abs(expected), _SMALLEST)
    result: NDArray[np.float64] = np.where(is_same, 0.0, np.where(is_finite, differences, math.inf))
    return result
