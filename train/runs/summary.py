"""What a table shows of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint.run_directory import RunDirectory
from train.data.epochs import steps_in
from train.exits import RunError, UsageError, first_line
from train.goodput.read import read_goodput
from train.json_files import is_count, is_number
from train.runs.state import Condition, condition, moment
from train.runs.tail import TRAINING_LOSS, Value, read_tail
from train.track.watched_metric import watched_metric

_LAST_ROW = 1 << 16
"""Bytes of metrics.jsonl in which the last row is looked for."""


@dataclass(frozen=True)
class Placement:
    """Where the last attempt ran."""

    strategy: str
    ranks: int
    nodes: int
    device: str

    def __str__(self) -> str:
        text = f"{self.strategy} x{self.ranks}"
        text = f"{text} on {self.nodes} nodes" if self.nodes > 1 else text
        return text if self.device in ("", "cpu") else f"{text}, {self.device}"


@dataclass(frozen=True)
class Summary:
    """One run. None stands for what is not known."""

    path: Path
    """The run directory, as it was found."""
    condition: Condition
    why: str | None = None
    """Why the run is unreadable."""
    id: str | None = None
    name: str | None = None
    created: float | None = None
    """Seconds since the epoch."""
    task: str | None = None
    step: int | None = None
    """The last step that was logged, or at which the run finished."""
    total_steps: int | None = None
    best: Value | None = None
    """The best value of the metric of checkpoint.keep_best or early_stop, else of eval/loss."""
    best_is_of_all: bool = True
    """Whether all of metrics.jsonl was read for it."""
    last: Value | None = None
    """The newest value of the same metric; of train/loss in a run without evaluations."""
    placement: Placement | None = None
    attempts: int = 0
    goodput: float | None = None
    """Committed compute in percent of the wall time."""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One of ``train.runs.state.STATES``."""
        return self.condition.state

    def age(self, now: float | None = None) -> float | None:
        """Seconds since the run last wrote something."""
        last = self.condition.last_sign
        return None if last is None else max(0.0, (time.time() if now is None else now) - last)

    def to_json(self, now: float | None = None) -> dict[str, Any]:
        """What ``isorun runs --json`` prints; docs/runs.md describes the keys."""
        end, place = self.condition.end, self.placement
        return {
            "path": str(self.path),
            "id": self.id,
            "name": self.name,
            "task": self.task,
            "state": self.state,
            "why": self.why,
            "step": self.step,
            "total_steps": self.total_steps,
            "best": _value(self.best) and {**_value(self.best), "of_all": self.best_is_of_all},
            "last": _value(self.last) or None,
            "placement": place and vars(place),
            "attempts": self.attempts,
            "goodput": self.goodput,
            "exit": end and vars(end),
            "created": self.created,
            "last_sign": self.condition.last_sign,
            "age": self.age(now),
        }


def _value(value: Value | None) -> dict[str, Any]:
    """A value for JSON, which has no NaN."""
    if value is None:
        return {}
    number = value.value if math.isfinite(value.value) else None
    return {"metric": value.metric, "value": number, "step": value.step}


def summarize(path: Path, now: float | None = None) -> Summary:
    """Reads what a table shows. A damaged run directory gives a summary that says why."""
    try:
        return _summary(path, now)
    except RunError as error:
        return _unreadable(path, first_line(error))
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, str) else ""
        return _unreadable(path, f"{name}: {error.strerror or error}".removeprefix(": "))


def _goodput(path: Path) -> float | None:
    """None also for a ledger that cannot be read: the rest of the run can be shown."""
    with suppress(OSError):
        if found := read_goodput(path):
            return round(found.percent, 3)
    return None


def current_condition(path: Path) -> Condition:
    """The state of a run now. Raises RunError, OSError and ValueError for a damaged one."""
    directory = RunDirectory(path)
    config = directory.stored_config() or {}
    row = read_tail(directory.metrics, *watched_metric(config), limit=_LAST_ROW).row
    attempts = directory.attempts.by_number()
    return condition(directory, config, attempts, directory.finished(), row)


def _unreadable(path: Path, why: str) -> Summary:
    return Summary(path, Condition("unreadable", None, None), why=why)


def _summary(path: Path, now: float | None) -> Summary:
    directory = RunDirectory(path)
    if not directory.exists:
        raise UsageError("run.json is missing")
    identity = directory.identity("")
    config = directory.stored_config() or {}
    finished = directory.finished()
    attempts = directory.attempts.by_number()
    last = attempts.get(max(attempts, default=0), {})
    metric, mode = watched_metric(config)
    tail = read_tail(directory.metrics, metric, mode)
    found = condition(directory, config, attempts, finished, tail.row, now)
    return Summary(
        path,
        found,
        id=identity.id,
        name=identity.name,
        created=moment(identity.created),
        task=task_of(config),
        step=finished["step"] if finished else (tail.row or {}).get("step"),
        total_steps=total_steps(config, last),
        best=tail.best,
        best_is_of_all=tail.complete,
        last=tail.newest.get(metric) or _final(finished, metric) or tail.newest.get(TRAINING_LOSS),
        placement=placement_of(last),
        attempts=max(attempts, default=0),
        goodput=_goodput(path),
        config=config,
    )


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key. Raises KeyError without one."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value


def task_of(config: Mapping[str, Any]) -> str | None:
    """The value of task.use."""
    with suppress(KeyError):
        use = value_at(config, "task.use")
        return use if isinstance(use, str) else None
    return None


def total_steps(config: Mapping[str, Any], attempt: Mapping[str, Any]) -> int | None:
    """The length of the run, from its config and the number of samples that an attempt recorded."""
    length = config.get("length")
    steps, epochs = (
        (length.get("steps"), length.get("epochs")) if isinstance(length, Mapping) else (None, None)
    )
    if is_count(steps):
        return steps
    samples, batch = attempt.get("samples"), attempt.get("batch")
    if is_number(epochs) and 0 < epochs < 1e12 and is_count(samples) and is_count(batch) and batch:
        return steps_in(float(epochs), samples, batch)
    return None


def placement_of(attempt: Mapping[str, Any]) -> Placement | None:
    """Where an attempt ran; None if its record does not say."""
    ranks, hosts = attempt.get("world_size"), attempt.get("hosts")
    if not is_count(ranks) or not isinstance(hosts, Sequence):
        return None
    strategy, device = str(attempt.get("strategy", "")), str(attempt.get("device", ""))
    return Placement(strategy, ranks, len(hosts), device)


def _final(finished: Mapping[str, Any] | None, metric: str) -> Value | None:
    """The metric that finished.json has, where metrics.jsonl was deleted."""
    metrics = (finished or {}).get("metrics")
    value = metrics.get(metric.removeprefix("eval/")) if isinstance(metrics, Mapping) else None
    if finished is None or not is_number(value):
        return None
    return Value(metric, float(value), finished["step"])
