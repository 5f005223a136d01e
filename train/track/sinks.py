"""What a sink is, and what it may know of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.exits import UsageError, first_line
from train.plugins import Plugin, find_plugin


@dataclass(frozen=True)
class RunInfo:
    """What sinks may know of the run."""

    id: str
    name: str
    directory: Path
    attempt: int
    wandb_id: str
    config: dict[str, Any]
    """The resolved config as JSON values."""
    code: dict[str, Any]
    """Versions and commit."""
    unit: str
    """What besides samples is counted, such as "tokens"."""
    total_steps: int
    start_step: int
    """The step that this attempt goes on from."""


class Sink:
    """A place that metrics go to; what it does not override it leaves out.

    All methods but ``abandon`` are called in the tracker's own thread. They may raise anything:
    the tracker then drops the sink.
    """

    name = ""
    """For messages; a sink of your own is named by its dotted path where this is empty."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def load(self) -> None:
        """Imports what ``open`` needs, and does nothing else."""

    def open(self) -> str | None:
        """Connects; returns something to be said, if there is anything."""
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step."""

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts (str) and images (uint8 array of shape (3, H, W))."""

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Arrays of finite numbers, none of them empty."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final numbers."""

    def close(self) -> None:
        """Writes what is left."""

    def abandon(self) -> None:
        """After a failure, or where the other methods take too long: sees to it that the process
        can end without this sink. Called in any thread; must not wait for anything."""


def find_sinks(plugins: Sequence[Plugin], origin: str) -> list[type[Sink]]:
    """The classes of the sinks that a config names; ``origin`` says where. Raises UsageError."""
    return [find_plugin(plugin, Sink, f"track.sinks ({origin})", None) for plugin in plugins]


def make_sinks(plugins: Sequence[Plugin], run: RunInfo) -> list[Sink]:
    """The sinks themselves. Raises UsageError where a constructor fails."""
    made = []
    for plugin, cls in zip(plugins, find_sinks(plugins, "config"), strict=True):
        try:
            sink = cls(run, **plugin.options)
        except Exception as error:
            raise UsageError(
                f"track.sinks names {plugin.use!r}, whose constructor failed "
                f"({type(error).__name__}: {first_line(error)}); fix it, or remove it."
            ) from error
        sink.name = sink.name or plugin.use
        made.append(sink)
    return made
