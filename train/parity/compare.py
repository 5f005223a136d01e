"""Compares runs of one config on several placements: metrics of training and evaluation, final
weights and ledgers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import dcp
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.data.ledger import read_steps
from train.distributed.shard import Shard
from train.imports import import_extra

LOSS, NORM, RATE = "train/loss", "train/gradient_norm", "train/learning_rate"
SKIPPED = "train/skipped_steps"
EVALUATION = "eval/"
_NEAR_ZERO = 1e-3
"""Evaluation metrics below it are compared by their difference divided by it: a metric that should
be 0 is a rounding error on each placement."""


@dataclass(frozen=True)
class Tolerance:
    """Relative tolerances. Learning rates, ledgers and skipped steps must be equal."""

    loss: float = 1e-5
    """For the loss of each step."""
    norm: float = 1e-4
    """For the gradient norm of each step."""
    weights: float = 1e-4
    """For the final weights: L2 norm of the difference divided by the L2 norm of the weights."""
    evaluation: float = 1e-4
    """For each metric of each evaluation."""


@dataclass(frozen=True)
class Comparison:
    """A run compared with the reference. Differences are relative, the maximum over all steps."""

    steps: int
    """Number of logged steps."""
    loss: float
    norm: float
    """Of the gradient norm."""
    rate: float
    """Of the learning rate."""
    evaluation: float
    """Of the evaluation metrics; NaN where the runs do not have the same ones."""
    weights: float
    """Of the final weights."""
    tensor: str
    """Which parameter or buffer has the largest part in it, and the difference of that one; empty
    if there is none."""
    same_ledger: bool
    same_skips: bool

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all differences are within the tolerances; false for NaN."""
        return (
            self.same_ledger
            and self.same_skips
            and self.rate == 0.0
            and self.loss <= tolerance.loss
            and self.norm <= tolerance.norm
            and self.evaluation <= tolerance.evaluation
            and self.weights <= tolerance.weights
        )


def curve(directory: Path, key: str, attempt: int | None = None) -> dict[int, float]:
    """The values of one metric of a run, or of the rows of one attempt, by step; NaN if not
    finite."""
    return {
        row["step"]: float("nan") if row[key] is None else float(row[key])
        for row in _rows(directory)
        if key in row and attempt in (None, row.get("attempt"))
    }


def _rows(directory: Path) -> list[dict[str, Any]]:
    text = RunDirectory(directory).metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compare(reference: Path, other: Path) -> Comparison:
    """Compares two run directories of finished runs that logged every step."""
    weights, tensor = weights_difference(reference, other)
    return Comparison(
        steps=len(curve(other, LOSS)),
        loss=largest_difference(curve(reference, LOSS), curve(other, LOSS)),
        norm=largest_difference(curve(reference, NORM), curve(other, NORM)),
        rate=largest_difference(curve(reference, RATE), curve(other, RATE)),
        evaluation=_evaluation_difference(reference, other),
        weights=weights,
        tensor=tensor,
        same_ledger=_ledger(reference) == _ledger(other),
        same_skips=curve(reference, SKIPPED) == curve(other, SKIPPED),
    )


def _evaluation_difference(reference: Path, other: Path) -> float:
    """The largest difference of the metrics of evaluations; 0 without any."""
    names = [
        {key for row in _rows(directory) for key in row if key.startswith(EVALUATION)}
        for directory in (reference, other)
    ]
    if names[0] != names[1]:
        return float("nan")
    differences = [
        largest_difference(curve(reference, name), curve(other, name), near_zero=_NEAR_ZERO)
        for name in sorted(names[0])
    ]
    return float("nan") if any(map(math.isnan, differences)) else max(differences, default=0.0)


def largest_difference(
    one: dict[int, float], other: dict[int, float], *, near_zero: float = 1e-30
) -> float:
    """Maximum difference of two curves, relative to the first, or to ``near_zero`` where that is
    larger; NaN if only one has a step or a finite value."""
    if one.keys() != other.keys():
        return float("nan")
    largest = 0.0
    for step, expected in one.items():
        found = other[step]
        if math.isnan(expected) and math.isnan(found):
            continue  # a skipped step
        difference = abs(found - expected) / max(abs(expected), near_zero)
        if not difference <= largest:  # a NaN stays
            largest = difference
        if math.isnan(largest):
            break
    return largest


def weights_difference(reference: Path, other: Path) -> tuple[float, str]:
    """Relative L2 difference of the final parameters and buffers, loaded one tensor at a time, and
    the tensor that has the largest part in it.

    NaN if names, shapes or dtypes differ.
    """
    paths = []
    for directory in (reference, other):
        store = CheckpointStore(RunDirectory(directory).checkpoints)
        paths.append(store.path(store.steps()[-1]))
    stored = [
        {n: s for n, s in dcp.shapes(path).items() if n.startswith("model.")} for path in paths
    ]
    if stored[0] != stored[1]:
        return float("nan"), ""
    squared = total = largest = 0.0
    worst = ""
    for name, (shape, dtype) in stored[0].items():
        one, two = (torch.empty(shape, dtype=dtype) for _ in paths)
        for tensor, path in zip((one, two), paths, strict=True):
            dcp.load({name: Shard.of(tensor)}, path, None)
        difference = float((one.double() - two.double()).square().sum())
        norm = float(one.double().square().sum())
        squared, total = squared + difference, total + norm
        if not difference <= largest:  # a NaN as well
            largest = difference
            worst = f"{name.removeprefix('model.')} ({_relative(difference, norm):.1e})"
    return _relative(squared, total), worst


def _relative(squared: float, total: float) -> float:
    return math.sqrt(squared / total) if total else math.sqrt(squared)


def _ledger(directory: Path) -> list[object]:
    return list(read_steps(RunDirectory(directory).ledger))


def import_pyplot() -> Any:
    """The plotting library, drawing to files only. Raises UsageError where it is not installed."""
    import_extra("matplotlib", "plot", "parity").use("Agg")
    return import_extra("matplotlib.pyplot", "plot", "parity")


def plot(directories: dict[str, Path], path: Path, title: str) -> None:
    """Writes a PNG to ``path``: loss curves, and their relative differences from the first."""
    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    curves = {name: curve(directory, LOSS) for name, directory in directories.items()}
    reference, *_ = curves.values()
    # Equal curves overlap: draw later ones thinner.
    for index, (name, values) in enumerate(curves.items()):
        width = 1.0 + 1.2 * (len(curves) - index)
        above.plot(list(values), list(values.values()), label=name, linewidth=width, alpha=0.7)
        if index:
            steps = [step for step in values if step in reference]
            differences = [
                abs(values[s] - reference[s]) / max(abs(reference[s]), 1e-30) for s in steps
            ]
            below.plot(steps, differences, label=name, linewidth=1)
            if max(differences, default=0.0) > 0:
                below.set_yscale("log")
    above.set(title=title, ylabel="loss")
    above.legend()
    below.set(xlabel="step", ylabel=f"relative difference from {next(iter(curves))}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
