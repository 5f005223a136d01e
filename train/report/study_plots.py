"""Drawings of a study: the history of an objective, parallel coordinates, importance of keys.

They are SVG without a script. The tables of the page have the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from train.report.html import Html, join, table, tag
from train.report.study_data import StudyAxis, StudyData, StudyTrial

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 24, 36
_PER_AXIS = 150
_LABEL = 22  # characters


@dataclass(frozen=True)
class _Scale:
    """A range of values. Those beyond it are drawn at its ends."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, from 0 to 1."""
        low, high, value = (self._plain(each) for each in (self.low, self.high, value))
        if high <= low:
            return 0.5
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def _plain(self, value: float) -> float:
        return math.log(max(value, self.low, 1e-300)) if self.log else value


def history(study: StudyData, index: int) -> Html:
    """The values of an objective by trial, with the best value up to each trial."""
    name, mode = study.objectives[index]
    shown = [
        (trial, value) for trial in study.trials if (value := _value(trial, index)) is not None
    ]
    if not shown:
        return tag("p", f"No trial has reported {name} yet.", class_="empty")
    scale = _objective_scale(study, index)
    last = max(1, *(trial.number for trial, _ in shown))

    def place(number: int, value: float) -> tuple[float, float]:
        across = _LEFT + number / last * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - scale.at(value) * (_HEIGHT - _TOP - _BOTTOM)

    shapes = _frame(scale, last)
    better = min if mode == "min" else max
    best: list[tuple[float, float]] = []
    so_far: float | None = None
    for trial, value in shown:
        if trial.state == "finished":
            if so_far is not None:
                best.append(place(trial.number, so_far))
            so_far = value if so_far is None else better(so_far, value)
            best.append(place(trial.number, so_far))
    shapes.append(tag("polyline", points=_points(best), class_="best-so-far"))
    for trial, value in shown:
        x, y = place(trial.number, value)
        shapes.append(
            tag(
                "circle", tag("title", _told(study, trial)), cx=f"{x:.1f}", cy=f"{y:.1f}", r="5",
                class_=f"dot {_kind(study, trial)}",
            )
        )  # fmt: skip
    beyond = sum(not scale.low <= value <= scale.high for _, value in shown)
    note = "Filled: finished trials. Rings: pruned ones, at their last evaluation. The line is the "
    note += "best value so far."
    if beyond:
        note += f" Values beyond the scale ({beyond:,}) are drawn at its edge."
    return join([_chart(f"{name} of each trial ({mode})", _WIDTH, _HEIGHT, shapes), _note(note)])


def _frame(scale: _Scale, last: int) -> list[Html]:
    bottom = _HEIGHT - _BOTTOM
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [
        _line(_LEFT, _TOP, _LEFT, bottom),
        _line(_LEFT, bottom, _WIDTH - _RIGHT, bottom),
        _text(_LEFT - 8, _TOP + 4, f"{scale.high:.4g}", "end"),
        _text(_LEFT - 8, bottom, f"{scale.low:.4g}", "end"),
        _text(_LEFT, bottom + 18, "0"),
        _text(_WIDTH - _RIGHT, bottom + 18, str(last), "end"),
        _text(middle, bottom + 28, "trial"),
    ]


def parallel_coordinates(study: StudyData) -> Html:
    """A line per trial through its values of all keys and its objectives."""
    shown = [trial for trial in study.trials if _value(trial, 0) is not None]
    if not shown:
        return tag("p", "No trial has a result yet.", class_="empty")
    scales = [_objective_scale(study, index) for index in range(len(study.objectives))]
    count = len(study.axes) + len(scales)
    width = max(_WIDTH, count * _PER_AXIS)
    height, top, bottom = 380, 56, 320

    def across(index: int) -> float:
        return width * (index + 0.5) / count

    shapes: list[Html] = []
    for index, axis in enumerate(study.axes):
        shapes += _axis(across(index), top, bottom, axis.name, _marks(axis))
    for index, scale in enumerate(scales, len(study.axes)):
        name = study.objectives[index - len(study.axes)][0]
        ends = [(0.0, f"{scale.low:.4g}"), (1.0, f"{scale.high:.4g}")]
        shapes += _axis(across(index), top, bottom, name, ends)
    is_unset = False
    for trial in sorted(shown, key=lambda each: each.number in study.best):  # the best on top
        places = [_place(axis, trial) for axis in study.axes]
        values = [_value(trial, index) for index in range(len(scales))]
        places += [
            None if value is None else scale.at(value)
            for value, scale in zip(values, scales, strict=True)
        ]
        is_unset = is_unset or None in places
        points = [
            (across(i), bottom + 22 if at is None else bottom - at * (bottom - top))
            for i, at in enumerate(places)
        ]
        shapes.append(
            tag(
                "polyline", tag("title", _told(study, trial)), points=_points(points),
                class_=f"path {_kind(study, trial)}",
                stroke_opacity=_strength(study, scales[0], trial),
            )
        )  # fmt: skip
    note = "The stronger a line, the better its trial in the first objective; the best is marked, "
    note += "pruned trials are dashed."
    if is_unset:
        shapes.append(_text(6, bottom + 26, "not set", "start"))
        note += " A key that a trial does not set is at the bottom."
    title = f"Values of {len(shown):,} trials"
    return join([_chart(title, width, height, shapes), _note(note)])


def _marks(axis: StudyAxis) -> list[tuple[float, str]]:
    if axis.choices:
        last = max(1, len(axis.choices) - 1)
        return [(number / last, text) for number, text in enumerate(axis.choices)]
    return [(0.0, f"{axis.low:.4g}"), (1.0, f"{axis.high:.4g}")]


def _place(axis: StudyAxis, trial: StudyTrial) -> float | None:
    value = trial.params.get(axis.name)
    if axis.choices:
        return next((at for at, text in _marks(axis) if text == value), None)
    if not isinstance(value, int | float):
        return None
    return _Scale(axis.low, axis.high, axis.log).at(float(value))


def _axis(
    x: float, top: float, bottom: float, name: str, marks: Iterable[tuple[float, str]]
) -> list[Html]:
    shapes = [_line(x, top, x, bottom), _text(x, top - 30, name, class_="name")]
    for at, label in marks:
        y = bottom - at * (bottom - top)
        shift = -8 if at == 1.0 else 16 if at == 0.0 else 4
        shapes.append(_text(x, y + shift, label))
    return shapes


def importance(study: StudyData) -> Html:
    """A bar for each key, per objective."""
    parts: list[Html] = []
    for name, shares in study.importance.items():
        ordered = sorted(shares.items(), key=lambda pair: -pair[1])
        shapes: list[Html] = []
        for row, (key, share) in enumerate(ordered):
            y = 20 + row * 28
            shapes += [
                _text(230, y + 13, key, "end", class_="name"),
                tag("rect", x="240", y=str(y), width=f"{share * 620:.1f}", height="18", rx="3",
                    class_="share"),
                _text(250 + share * 620, y + 13, f"{100 * share:.0f} %", "start"),
            ]  # fmt: skip
        title = f"Importance for {name}"
        rows = [[key, f"{100 * share:.1f} %"] for key, share in ordered]
        parts += [
            tag("h3", title),
            _chart(title, _WIDTH, 40 + 28 * len(ordered), shapes),
            table(title, ["key", "importance"], rows),
        ]
    return join([*parts, _note(study.about_importance)])


def _objective_scale(study: StudyData, index: int) -> _Scale:
    """From the best value to the worst of a finished trial; a few that are much worse than most are
    beyond it, since they would hide the rest."""
    mode = study.objectives[index][1]
    found = [(trial.state, _value(trial, index)) for trial in study.trials]
    values = [v for state, v in found if v is not None and state == "finished"]
    values = values or [v for _, v in found if v is not None]
    if not values:
        return _Scale(0.0, 1.0)
    low, high = min(values), max(values)
    reach = 4 * abs(median(values) - (low if mode == "min" else high))
    if reach and len(values) > 3:
        low, high = (
            (low, min(high, low + reach)) if mode == "min" else (max(low, high - reach), high)
        )
    return _Scale(low, high)


def _strength(study: StudyData, scale: _Scale, trial: StudyTrial) -> str:
    """The opacity of a line. ``scale``: that of the first objective."""
    value, mode = _value(trial, 0), study.objectives[0][1]
    if value is None:
        return "0.15"
    at = scale.at(value)
    good = 1.0 - at if mode == "min" else at
    return f"{0.15 + 0.75 * good**2:.2f}"


def _value(trial: StudyTrial, index: int) -> float | None:
    if trial.state not in ("finished", "pruned") or not trial.values:
        return None
    value = trial.values[index] if index < len(trial.values) else None
    return value if value is not None and math.isfinite(value) else None


def _kind(study: StudyData, trial: StudyTrial) -> str:
    return "best" if trial.number in study.best else trial.state


def _told(study: StudyData, trial: StudyTrial) -> str:
    """A trial in a sentence."""
    results = [
        f"{name} {value:.4g}"
        for index, (name, _) in enumerate(study.objectives)
        if (value := _value(trial, index)) is not None
    ]
    params = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in trial.params.items()
    ]
    return f"trial {trial.number}, {trial.state}: {', '.join(results)}; {', '.join(params)}"


def _chart(title: str, width: float, height: float, shapes: Sequence[Html]) -> Html:
    return tag(
        "svg", *shapes,
        class_="chart", role="img", aria_label=title, viewBox=f"0 0 {width:g} {height:g}",
    )  # fmt: skip


def _text(
    x: float, y: float, words: str, anchor: str = "middle", class_: str | None = None
) -> Html:
    short = words if len(words) <= _LABEL else f"{words[: _LABEL - 1]}…"
    full = tag("title", words) if short != words else None
    return tag("text", short, full, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    at = {
        name: f"{v:.1f}" for name, v in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
    }
    return tag("line", class_="axis", **at)


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _note(words: str) -> Html | None:
    return tag("p", words, class_="note") if words else None
