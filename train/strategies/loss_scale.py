"""The dynamic loss scale of fp16 (Micikevicius et al., 2018), the same for every strategy."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Keeps small gradients from vanishing in fp16: the loss is multiplied by ``value`` and the
    gradients are divided by it. All ranks skip the same steps, so all have the same value."""

    GROWTH_INTERVAL = 2000

    def __init__(self) -> None:
        self.value = 2.0**16
        self.steps_since = 0
        """Steps since it last changed."""

    def update(self, *, skipped: bool) -> None:
        """Halves it after a step that was not finite; doubles it after many that were."""
        self.steps_since += 1
        if skipped:
            self.value, self.steps_since = self.value / 2, 0
        elif self.steps_since == self.GROWTH_INTERVAL:
            self.value, self.steps_since = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"value": self.value, "steps_since": self.steps_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.value, self.steps_since = state["value"], state["steps_since"]
