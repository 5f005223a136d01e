"""The comparison of several runs: as JSON and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.checkpoint.run_view import Run
from train.runs.curves import (
    Losses,
    Metric,
    compare_losses,
    curves,
    directions,
    empty,
    side_by_side,
)
from train.runs.differences import (
    ConfigRows,
    Rows,
    code,
    config_rows,
    data,
    differing,
    environment,
    has_fingerprint,
)
from train.runs.summary import Summary, summarize
from train.runs.table import drawn
from train.runs.tail import TRAINING_LOSS

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = ("eval/", "train/")
"""The metrics that the text has; the JSON has all."""


@dataclass(frozen=True)
class Comparison:
    """Several runs, compared with the first."""

    runs: list[Summary]
    config: ConfigRows
    code: Rows
    data: Rows
    has_fingerprints: bool
    """Whether each run has a checkpoint with the fingerprint of its data."""
    environment: Rows
    metrics: list[Metric]
    losses: Losses
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """What ``isorun compare --json`` prints; docs/runs.md describes the keys."""
        losses = self.losses
        return {
            "runs": [run.to_json() for run in self.runs],
            "config": {
                "semantic": self.config.semantic,
                "non_semantic": self.config.non_semantic,
            },
            "code": self.code,
            "data": self.data,
            "data_fingerprints": self.has_fingerprints,
            "environment": self.environment,
            "metrics": {
                metric.name: {
                    "final": [_point(point) for point in metric.final],
                    "best": [_point(point) for point in metric.best],
                    "common_step": metric.common_step,
                    "common": [_finite(value) for value in metric.common],
                }
                for metric in self.metrics
            },
            "losses": {
                "tolerance": self.tolerance,
                "steps": losses.steps,
                "first_difference": losses.first,
                "values": [_finite(value) for value in losses.values],
                "largest": _finite(losses.largest),
                "largest_step": losses.largest_step,
            },
        }


def compare(runs: Sequence[Run], tolerance: float) -> Comparison:
    """Compares runs with the first of them. Raises RunError for a damaged run directory."""
    each = [curves(run) for run in runs]
    return Comparison(
        runs=[summarize(run.path) for run in runs],
        config=config_rows([run.config for run in runs]),
        code=differing([code(run) for run in runs]),
        data=data(runs),
        has_fingerprints=all(map(has_fingerprint, runs)),
        environment=differing([environment(run) for run in runs]),
        metrics=side_by_side(each, directions(runs)),
        losses=compare_losses(
            [metrics.get(TRAINING_LOSS) or empty() for metrics in each], tolerance
        ),
        tolerance=tolerance,
    )


def text(found: Comparison, names: Sequence[str], width: int | None) -> list[str]:
    """The comparison in lines; ``names`` are the runs as the user has named them."""
    labels = [_label(number) for number in range(len(names))]
    lines = drawn(
        [
            [label, name, run.state, _steps(run), str(run.placement or "-")]
            for label, name, run in zip(labels, names, found.runs, strict=True)
        ],
        width,
    )

    def section(title: str, rows: Rows) -> None:
        body = [[name, *map(_shown, values)] for name, values in rows.items()]
        lines.extend([title, *drawn([["", *labels], *body], width, indent="  ")])

    lines.append("")
    config = found.config
    if config.semantic:
        section("config: these differences change results", config.semantic)
    else:
        lines.append("config: no semantic difference")
    if config.non_semantic:
        section("config: these differences do not change results", config.non_semantic)
    for title, rows, same in (
        ("code", found.code, "the same"),
        ("data", found.data, _same_data(found)),
        ("environment", found.environment, "the same"),
    ):
        if rows:
            section(f"{title}: differs", rows)
        else:
            lines.append(f"{title}: {same}")
    shown = [metric for metric in found.metrics if metric.name.startswith(_SHOWN)]
    if shown:
        lines += ["", *drawn(_metric_rows(shown, labels), width)]
    return [*lines, "", losses_text(found.losses, labels, found.tolerance)]


def losses_text(losses: Losses, labels: Sequence[str], tolerance: float) -> str:
    """One line about the training losses."""
    if not losses.steps:
        return (
            "losses: not comparable, since the runs have no step in common at which they logged "
            "the loss of the same steps"
        )
    if losses.first is None:
        steps = f"{losses.steps} common logged steps"
        same = f"losses: equal at {steps} within a relative {tolerance:g}"
        if losses.largest_step is None:
            return same
        return f"{same} (largest difference {losses.largest:.1e}, at step {losses.largest_step})"
    pairs = zip(labels, losses.values, strict=True)
    values = ", ".join(f"{label} {value:.7g}" for label, value in pairs)
    return (
        f"losses: differ by more than a relative {tolerance:g} from step {losses.first} on "
        f"({values}); largest difference {losses.largest:.1e}, at step {losses.largest_step}"
    )


def _label(number: int) -> str:
    return _LETTERS[number] if number < len(_LETTERS) else f"R{number + 1}"


def _steps(run: Summary) -> str:
    return f"step {run.step or 0}/{'?' if run.total_steps is None else run.total_steps}"


def _same_data(found: Comparison) -> str:
    if found.has_fingerprints:
        return "the same"
    return "the same number of samples; not each run has a checkpoint with their fingerprint"


def _metric_rows(metrics: Sequence[Metric], labels: Sequence[str]) -> list[list[str]]:
    rows = [["metric", "", *labels]]
    for metric in metrics:
        rows.append([metric.name, "final", *map(_shown_point, metric.final)])
        if any(metric.best):
            rows.append(["", "best", *map(_shown_point, metric.best)])
        ends = {point[0] for point in metric.final if point}
        if metric.common_step is not None and len(ends) > 1:
            common = [_number(value) for value in metric.common]
            rows.append(["", f"at step {metric.common_step}", *common])
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return "-" if value is None else str(value)


def _shown_point(point: tuple[int, float] | None) -> str:
    return "-" if point is None else f"{_number(point[1])} @{point[0]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _point(point: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if point is None else {"step": point[0], "value": _finite(point[1])}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
