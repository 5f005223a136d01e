"""The dynamic loss scale of fp16 (Micikevicius et al., 2018), the same for every strategy."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Avoids underflow of gradients in fp16: the loss is multiplied by ``value`` and the gradients
    are divided by it. All ranks skip the same steps, so ``value`` is the same on all ranks."""

    GROWTH_INTERVAL = 2000

    def __init__(self) -> None:
        self.value = 2.0**16
        self.steps_since = 0
        """Steps since ``value`` last changed."""

    def update(self, *, skipped: bool) -> None:
        """Halves ``value`` after a skipped step; doubles it after 2,000 steps without one."""
        self.steps_since += 1
        if skipped:
            self.value, self.steps_since = self.value / 2, 0
        elif self.steps_since == self.GROWTH_INTERVAL:
            self.value, self.steps_since = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"value": self.value, "steps_since": self.steps_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.value, self.steps_since = state["value"], state["steps_since"]
