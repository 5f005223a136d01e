"""The base class of sinks, and the run information that they get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from train.data.stored_fingerprint import digest
from train.exits import RunError, UsageError, first_line, prefixed
from train.plugins import Plugin, find_plugin
from train.process.stop_signals import is_of_signal
from train.secrets import redact_values
from train.track.event_log import Event, events_until
from train.track.wandb_rows import as_logged, committed_rows


class Row(NamedTuple):
    """What metrics.jsonl has of a step."""

    step: int
    time: float | None
    """When it was logged, in seconds since the epoch; None if the file does not say."""
    attempt: int | None
    """The attempt that logged it."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunInfo:
    """The run information that sinks get."""

    id: str
    name: str
    directory: Path
    attempt: int
    """Number of this attempt, from 1."""
    wandb_id: str
    config: dict[str, Any]
    """The resolved config, as JSON values."""
    code: dict[str, Any]
    """Package version and git commit."""
    unit: str
    """The task's unit, such as "tokens"."""
    total_steps: int
    start_step: int
    """The step that this attempt resumes from; 0 for a new run."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What this attempt runs on, as JSON values: ``placement``, ``environment`` (versions),
    ``image``, ``dataset``, ``model_summary``; in ``attempts`` the same by number of the attempts
    so far, with ``code`` and ``ended``."""
    changes: Callable[[], Path | None] = lambda: None
    """The file of the run directory with what the code differs in from its commit; None without.
    Waits until git has told it, some seconds at most."""
    inputs: tuple[str, ...] = ()
    """The artifacts of W&B that it has started from: ``entity/project/name:version``."""

    def rows(self, after: int = -1, until: int | None = None) -> Iterator[Row]:
        """The rows of metrics.jsonl of the steps later than ``after`` up to ``until``, in order. By
        default ``until`` is ``start_step``: these steps are committed, and no attempt repeats them.
        A later row may still change.

        Reads the whole file: for what a destination lacks, not for every step.
        """
        last = self.start_step if until is None else until
        for step, row in committed_rows(self.directory / "metrics.jsonl", last):
            if step > after:
                metrics, columns = as_logged(row)
                time, attempt = columns.get("_timestamp"), columns.get("attempt")
                yield Row(step, time, attempt, metrics)

    def events(self) -> Iterator[Event]:
        """What happened in earlier attempts, in order: what those told their sinks, and starts of
        attempts that were killed at once. Steps after ``start_step`` were not committed."""
        return events_until(self.directory, self.attempt - 1)

    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """The config, ``code`` and the facts except ``model_summary``, without secrets, as one flat
        dict: the value of ``optim.lr`` is below that name. Lists are JSON texts."""
        facts = {name: fact for name, fact in self.facts.items() if name != "model_summary"}
        return dict(_flat("", redact_values({**self.config, "code": self.code, **facts})))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str | int | float | bool | None]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    elif value is None or isinstance(value, str | int | float | bool):
        yield prefix, value
    else:
        yield prefix, json.dumps(value)


def dataset_facts(samples: int, fingerprint: Any) -> dict[str, Any]:
    """What sinks get to know of the dataset, of which ``fingerprint`` has JSON values."""
    return {"samples": samples, "fingerprint": digest(fingerprint)}


class Sink:
    """A destination of metrics. Every method has an empty default.

    All methods except ``abandon`` are called in a thread of the sink's own, in the order in which
    the run logged. If one raises, the tracker logs a warning and drops the sink. Each sink gets
    dicts of its own, but all get the same arrays and must not change them. ``close`` and the calls
    that still wait before it have 20 s; after that the process ends without them.
    """

    name = ""
    """Name in messages; by default the dotted path in the config."""
    logged_at: float | None = None
    """When the item of the present call was logged, in seconds since the epoch: the call may be
    later, after the sink's imports for instance. None outside a call by the tracker."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def load(self) -> None:
        """Imports the modules that ``open`` needs; does nothing else."""

    def open(self) -> str | None:
        """Opens the destination; returns a message for the user, or None."""
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the scalars of a step."""

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Logs texts (str) and images (uint8 arrays of shape (3, H, W)), by name."""

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs histograms of non-empty arrays of finite numbers, by name."""

    def event(self, step: int, text: str) -> None:
        """Logs a sentence about what happened at a step: a start after a failure, a warning."""

    def checkpoint(self, step: int) -> None:
        """Called after the checkpoint of a step was committed or its evaluation added; it may have
        been removed since."""

    def trace(self, step: int, path: Path) -> None:
        """Called when a trace of torch.profiler was written that ends with this step. The file is
        in profile/attempt-K of the run directory, where traces of other ranks may be as well."""

    def advance(self, step: int) -> None:
        """Called once after the last item of a step was logged: ``step`` is a later one."""

    def interrupted(self, step: int) -> None:
        """Called before ``close`` when the attempt ends within the evaluation of a step. The next
        attempt makes it and logs the rest of the step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Logs the final metrics."""

    @staticmethod
    def summary_names(values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of ``summary`` with the names that W&B and TensorBoard have for them, such as
        ``final/loss`` and ``goodput/percent``."""
        return {n if n.startswith("goodput/") else f"final/{n}": v for n, v in values.items()}

    def fail(self, code: int) -> None:
        """Called before ``close`` when an error ends the run, with its exit code."""

    def end(self, code: int) -> None:
        """Called before ``close`` with the exit code of this attempt: 0 after the last step, 143 if
        it was stopped and can be resumed, else that of the error, after ``fail``. A process that is
        killed calls neither."""

    def close(self) -> None:
        """Flushes and closes the destination."""

    def abandon(self) -> None:
        """Releases whatever could block the process exit, after a failure or a timeout.

        Called in any thread; must not block.
        """


def find_sinks(plugins: Sequence[Plugin], origin: str) -> list[type[Sink]]:
    """The sink classes that a config names; ``origin`` is where it names them, for error messages.

    Raises UsageError if there is no such class.
    """
    return [find_plugin(plugin, Sink, f"track.sinks ({origin})", None) for plugin in plugins]


def make_sinks(plugins: Sequence[Plugin], run: RunInfo) -> list[Sink]:
    """Creates the sinks that a config names. Raises UsageError if a constructor fails."""
    made = []
    for plugin, cls in zip(plugins, find_sinks(plugins, "config"), strict=True):
        try:
            sink = cls(replace(run, config=redact_values(deepcopy(run.config))), **plugin.options)
        except RunError as error:
            raise prefixed(f"track.sinks names {plugin.use!r}", error) from error
        except BaseException as error:
            if is_of_signal(error):
                raise
            raise UsageError(
                f"track.sinks names {plugin.use!r}, whose constructor failed "
                f"({type(error).__name__}: {first_line(error)}); fix it, or remove it."
            ) from error
        sink.name = sink.name or plugin.use
        made.append(sink)
    return made
