"""What a report shows of a run, read from its run directory. Nothing is written there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train.checkpoint.attempts import Attempts
from train.checkpoint.damage import DamagedError, refused_files
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_view import Checkpoint, Run
from train.data.stored_fingerprint import digest
from train.goodput.phases import LABELS
from train.goodput.read import read_goodput
from train.json_files import is_count
from train.report.curves import Metrics, read_metrics
from train.report.marks import Mark, find_marks
from train.report.state import State, in_words
from train.runs.state import End, ends_of
from train.runs.summary import current_condition
from train.track.samples import read_samples, sample_steps

SAMPLE_STEPS = 12
"""The most steps whose samples are shown."""


class GoodputPart(NamedTuple):
    """What a part of the wall time was used for."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, over all attempts."""

    ratio: float
    """Of the wall time, what was used for steps that count; from 0 to 1."""
    parts: list[GoodputPart]
    """They sum to the wall time; in the order in which the bar shows them."""
    cost: str = ""
    """The cost of the run, in words; empty where it is unknown."""


@dataclass
class RunData:
    """A run, as the report shows it."""

    path: Path
    id: str
    name: str
    created: float
    state: State
    config: dict[str, Any]
    attempts: dict[int, dict[str, Any]]
    finished: dict[str, Any]
    metrics: Metrics
    checkpoints: list[Checkpoint]
    marks: list[Mark]
    ends: dict[int, End] = field(default_factory=dict)
    """How attempts ended, without those of which nothing is known."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What ``read_samples`` gives for each step shown, newest first."""
    samples_left_out: int = 0
    """Steps with samples that are not shown."""
    data: dict[str, Any] = field(default_factory=dict)
    """What identifies the training data, by name."""
    goodput: Goodput | None = None
    """None where it is not recorded."""

    @property
    def last_attempt(self) -> dict[str, Any]:
        """What the newest attempt recorded; {} before the first."""
        return self.attempts[max(self.attempts)] if self.attempts else {}

    @property
    def step(self) -> int:
        """The last step that is known."""
        steps = [checkpoint.step for checkpoint in self.checkpoints[-1:]]
        if self.metrics.last:
            steps.append(self.metrics.last.step)
        if is_count(self.finished.get("step")):
            steps.append(self.finished["step"])
        return max(steps, default=0)

    @property
    def total_steps(self) -> int | None:
        """``length.steps``; None where the length is in epochs."""
        length = self.config.get("length")
        steps = length.get("steps") if isinstance(length, Mapping) else None
        return steps if is_count(steps) and steps else None

    @property
    def task(self) -> str:
        """``task.use``; empty before the first attempt."""
        task = self.config.get("task")
        return str(task.get("use", "")) if isinstance(task, Mapping) else ""


def read_run(path: str | Path) -> RunData:
    """Reads a run directory. Raises UsageError where there is no run, and ResumeRefusedError for
    files that are damaged or of a kind that they must not have."""
    run = Run(path)
    with refused_files(run.path):
        attempts = Attempts(run.path / "attempts.jsonl").by_number()
        ends = ends_of(run.path, attempts)
        metrics = read_metrics(run.path / "metrics.jsonl")
        checkpoints = run.checkpoints
        finished = run.finished or {}
        state = in_words(current_condition(run.path))
        goodput = _goodput(run.path)
        steps = sample_steps(run.path)
    shown = [*reversed(steps)][:SAMPLE_STEPS]
    return RunData(
        path=run.path,
        id=run.id,
        name=run.name,
        created=float(run.created),
        state=state,
        config=run.config,
        attempts=attempts,
        ends=ends,
        finished=finished,
        metrics=metrics,
        checkpoints=checkpoints,
        marks=find_marks(run.path, attempts, ends, metrics, checkpoints, state),
        samples=[values for step in shown if (values := read_samples(run.path, step))],
        samples_left_out=len(steps) - len(shown),
        data=_data(checkpoints, attempts),
        goodput=goodput,
    )


def _goodput(path: Path) -> Goodput | None:
    found = read_goodput(path)
    if found is None:
        return None
    parts = [GoodputPart(LABELS[name], s) for name, s in found.seconds.items() if s > 0]
    return Goodput(found.percent / 100, parts)


def _data(checkpoints: list[Checkpoint], attempts: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Number of samples, seed, and a fingerprint of some samples, from the newest checkpoint."""
    last = attempts[max(attempts)] if attempts else {}
    found: dict[str, Any] = {
        "samples": last.get("samples"), "seed": last.get("seed"), "global batch": last.get("batch")
    }  # fmt: skip
    try:
        stored = Manifest.read(checkpoints[-1].path).state.get("data") if checkpoints else None
    except (DamagedError, OSError):
        stored = None
    found["fingerprint"] = digest(stored)
    return {name: value for name, value in found.items() if value is not None}
