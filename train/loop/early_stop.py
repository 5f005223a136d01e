"""Early stopping on a reported metric. Its whole state is three numbers, kept in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from train.exits import UsageError
from train.section import Section


class EarlyStopConfig(Section):
    """Ends the run when a metric has stopped getting better."""

    metric: str = "loss"
    """Name of the evaluation metric that is watched."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    patience: int = Field(3, ge=1)
    """Evaluations in a row without improvement after which the run ends."""

    min_delta: float = Field(0.0, ge=0.0)
    """By how much the metric must change to count as better."""


@dataclass
class EarlyStop:
    """Watches one metric; ``stopped`` is true once patience is used up."""

    config: EarlyStopConfig
    best: float | None = None
    waited: int = 0
    stopped: bool = False

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes in one evaluation. A value that is not finite never counts as better."""
        value = metric_value(metrics, self.config.metric, "early_stop.metric")
        sign = 1.0 if self.config.mode == "min" else -1.0
        better = math.isfinite(value) and (
            self.best is None or sign * value < sign * self.best - self.config.min_delta
        )
        if better:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self.stopped = self.waited >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        state = asdict(self)
        del state["config"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.best, self.waited, self.stopped = state["best"], state["waited"], state["stopped"]


def metric_value(metrics: Mapping[str, float], name: str, field: str) -> float:
    """The metric that the config's ``field`` names; UsageError where there is none of the name."""
    try:
        return metrics[name]
    except KeyError:
        raise UsageError(
            f"{field} is {name!r}, but the task's evaluation reports only "
            f"{', '.join(sorted(metrics))}; name one of these."
        ) from None
