"""The plots of a report: which metrics share one, their points, and what is said about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train.report.curves import SKIPPED, Curve, Point
from train.report.data import RunData

POINTS = 40_000
"""The most points of a run, in all plots together."""
FEWEST = 200
"""The most points of a curve where a run has very many curves."""
FIGURES = 60
SERIES = 24
"""The most curves of a plot."""
_ROWS = 12
"""Rows in the table of a plot."""

_SPEED = {"speed/mfu"}
_SINGLE = {
    "train/loss": ("Loss", ""),
    "eval/loss": ("Loss", ""),
    "train/learning_rate": ("Learning rate", ""),
    "train/gradient_norm": ("Gradient norm", "L2, before clipping"),
    SKIPPED: ("Skipped steps", "total"),
    "speed/mfu": ("Model FLOPs utilisation", "ratio"),
}
_SHARED = {"time": ("Time per step", "s"), "memory": ("Memory", "GiB")}
_SECTIONS = ("Training", "Evaluation", "Speed and memory", "Other metrics")


@dataclass(frozen=True)
class Series:
    """A curve in a plot."""

    run: int
    """Index of the run in the report."""
    metric: str
    curve: Curve


@dataclass(frozen=True)
class Figure:
    """A plot."""

    id: str
    section: str
    title: str
    unit: str
    series: list[Series]
    left_out: int
    """Curves beyond the limit of a plot."""

    @property
    def is_positive(self) -> bool:
        """Whether all values are above 0, so that a logarithmic scale shows them."""
        lows = [series.curve.low for series in self.series]
        return all(low is not None and (low.value or 0) > 0 for low in lows)

    @property
    def buckets(self) -> int:
        """The most steps that one bucket of a curve stands for; 1 if all values are drawn."""
        return max(
            (s.curve.width for s in self.series if len(s.curve.points()) < s.curve.count), default=1
        )


def find_figures(runs: Sequence[RunData], most: int = SERIES) -> tuple[list[Figure], int]:
    """The plots, in the order of the page, and the number of those left out. Reduces the curves to
    what is drawn. ``most``: curves of a plot."""
    for run in runs:
        points = max(FEWEST, min(2000, POINTS // max(1, len(run.metrics.curves))))
        for curve in run.metrics.curves.values():
            curve.reduce(points)
    groups: dict[tuple[str, str, str], list[Series]] = {}
    for index, run in enumerate(runs):
        for metric, curve in run.metrics.curves.items():
            if (place := _place(metric, curve)) and curve.first:
                groups.setdefault(place, []).append(Series(index, metric, curve))
    order = {name: number for number, name in enumerate(_SECTIONS)}
    firsts = [*(title for title, _ in _SINGLE.values()), "Throughput"]
    ranks = {title: number for number, title in enumerate(dict.fromkeys(firsts))}
    places = sorted(groups, key=lambda p: (order[p[0]], ranks.get(p[1], len(ranks)), p[1]))
    figures = [
        Figure(
            f"figure-{number}",
            section,
            title,
            unit,
            groups[section, title, unit][:most],
            max(0, len(groups[section, title, unit]) - most),
        )
        for number, (section, title, unit) in enumerate(places[:FIGURES])
    ]
    return figures, max(0, len(places) - FIGURES)


def _place(metric: str, curve: Curve) -> tuple[str, str, str] | None:
    """Section, title and unit of the plot that shows a metric; None if none does."""
    if metric == "train/epoch" or (metric == SKIPPED and curve.high and not curve.high.value):
        return None  # the step says the same, or there is nothing to see
    speed = "Speed and memory"
    if metric in _SINGLE:
        return ("Training" if metric not in _SPEED else speed), *_SINGLE[metric]
    prefix, _, rest = metric.partition("/")
    if prefix in _SHARED:
        return speed, *_SHARED[prefix]
    if prefix == "eval" and rest:
        return "Evaluation", rest.split("/")[0], ""
    if prefix != "speed":
        return "Other metrics", metric, ""
    unit = rest.removesuffix("_per_second")
    return speed, *((rest, "") if unit == rest else ("Throughput", f"{unit}/s"))


def drawn(runs: Sequence[RunData], figures: Iterable[Figure]) -> dict[str, Any]:
    """What the page's script draws, as JSON values. Curves with the same steps share an axis."""
    axes: list[dict[tuple[int, ...], int]] = [{} for _ in runs]
    columns: list[list[dict[str, list[float]]]] = [[] for _ in runs]
    plots = []
    for figure in figures:
        series = []
        for one in figure.series:
            points = one.curve.points()
            known, steps = axes[one.run], tuple(point.step for point in points)
            if steps not in known:
                known[steps] = len(known)
                times = _elapsed(points, start_of(runs[one.run]))
                columns[one.run].append({"x": list(steps), "t": times})
            values = [None if p.value is None else float(f"{p.value:.6g}") for p in points]
            series.append({"run": one.run, "metric": one.metric, "axis": known[steps], "y": values})
        plots.append({"id": figure.id, "title": figure.title, "series": series})
    return {
        "runs": [
            {
                "label": label,
                "axes": columns[index],
                "marks": [
                    {
                        "kind": mark.kind,
                        "x": mark.step,
                        "t": None if mark.time is None else round(mark.time - start_of(run), 1),
                        "text": mark.text[:160],
                        "first": mark.kind == "attempt" and mark.attempt == min(run.attempts),
                        "attempt": mark.attempt,
                    }
                    for mark in run.marks
                ],
            }
            for index, (run, label) in enumerate(zip(runs, labels(runs), strict=True))
        ],
        "figures": plots,
    }


def labels(runs: Sequence[RunData]) -> list[str]:
    """A short name for each run; with the end of its id where several have one name."""
    names = [run.name[:60] or run.id for run in runs]
    ids = [run.id.rpartition("-")[2] for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({end})"
        for name, end in zip(names, ids, strict=True)
    ]


def start_of(run: RunData) -> float:
    """When the time line of a run begins, in seconds since the epoch."""
    times = [mark.time for mark in run.marks if mark.time is not None]
    times += [first.time for first, _ in run.metrics.attempts.values() if first.time is not None]
    return min(times, default=run.created)


def _elapsed(points: Sequence[Point], start: float) -> list[float]:
    """Seconds since the start of the run, never decreasing: the clocks of two hosts may differ."""
    found, before = [], 0.0
    for point in points:
        before = max(before, before if point.time is None else point.time - start)
        found.append(round(before, 1))
    return found


def described(series: Series, label: str) -> str:
    """A curve in a sentence."""
    curve = series.curve
    name = f"{label}{series.metric}"
    if not (curve.first and curve.last and curve.low and curve.high):
        return f"{name}: no finite value in {curve.count:,} rows."
    text = f"{name}: {shown(curve.first.value)} at step {curve.first.step:,}"
    if curve.count > 1:
        text += f", {shown(curve.last.value)} at step {curve.last.step:,}"
        text += f"; lowest {shown(curve.low.value)} (step {curve.low.step:,})"
        text += f", highest {shown(curve.high.value)} (step {curve.high.step:,})"
    if curve.not_finite:
        text += f"; {curve.not_finite:,} of {curve.count:,} values not finite"
    return text + "."


def shown(value: float | None) -> str:
    """A value for people."""
    return "not finite" if value is None else f"{value:.5g}"


def table_rows(figure: Figure) -> list[list[str]]:
    """Some steps, evenly spread, and the value of each curve there or at its last step before."""
    points = [series.curve.points() for series in figure.series]
    steps = sorted({point.step for each in points for point in each})
    if len(steps) > _ROWS:
        last = len(steps) - 1
        steps = [steps[round(number * last / (_ROWS - 1))] for number in range(_ROWS)]
    rows = []
    for step in steps:
        row = [f"{step:,}"]
        for each in points:
            before = [point for point in each if point.step <= step]
            row.append(shown(before[-1].value) if before else "–")
        rows.append(row)
    return rows
