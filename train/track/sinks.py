"""What a sink is, and what it may know of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


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


class Sink(Protocol):
    """A place that metrics go to. All its methods are called in the tracker's own thread; they
    may raise anything: the tracker then drops the sink."""

    name: str

    def load(self) -> None:
        """Imports what ``open`` needs, and does nothing else."""

    def open(self) -> str | None:
        """Connects; returns something to be said, if there is anything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step."""

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts (str) and images (uint8 array of shape (3, H, W))."""

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Arrays of finite numbers, none of them empty."""

    def flush(self) -> None:
        """Hands what was logged to the system: a checkpoint of it is being committed."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final numbers."""

    def close(self) -> None:
        """Writes what is left."""
