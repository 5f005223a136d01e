"""Early stopping on an evaluation metric. Checkpoints keep its state, three numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from train.config.schema import EarlyStopConfig
from train.exits import UsageError


@dataclass
class EarlyStop:
    """Watches one metric; ``stopped`` is true once it has not improved ``patience`` times."""

    config: EarlyStopConfig
    best: float | None = None
    waited: int = 0
    stopped: bool = False

    def update(self, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation. A value that is not finite never counts as better."""
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
        """Restores what ``state_dict`` returned."""
        self.best, self.waited, self.stopped = state["best"], state["waited"], state["stopped"]


def metric_value(metrics: Mapping[str, float], name: str, field: str) -> float:
    """The metric that the config's ``field`` names. Raises UsageError where there is none."""
    try:
        return metrics[name]
    except KeyError:
        raise UsageError(
            f"{field} is {name!r}, but the task's evaluation reports only "
            f"{', '.join(sorted(metrics))}; name one of these."
        ) from None
