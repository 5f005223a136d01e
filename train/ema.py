"""An exponential moving average of the weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field

from train.section import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class EmaConfig(Section):
    """Keeps an average of the weights and evaluates and exports that."""

    decay: float = Field(0.999, gt=0.0, lt=1.0)
    """Each committed step: average = decay * average + (1 - decay) * weights."""


class Ema:
    """The average of a model's trainable parameters, in their own dtypes, on their devices."""

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self.decay = config.decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self.parameters.items()
        }

    def update(self, skipped: torch.Tensor) -> None:
        """Takes in the weights after a step; changes nothing where ``skipped`` (a scalar on the
        device, 1.0 for a skipped step) says so, and never waits for the device."""
        import torch

        averages = list(self.averages.values())
        weight = (1.0 - self.decay) * (1.0 - skipped)
        with torch.no_grad():
            # Not _foreach_lerp_, which would read the weight on the host.
            changes = torch._foreach_sub(self._weights(), averages)
            torch._foreach_mul_(changes, weight.to(averages[0].dtype))
            torch._foreach_add_(averages, changes)

    def _weights(self) -> list[Tensor]:
        return list(self.parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages as its weights; the weights come back at the end."""
        import torch

        parameters, averages = self._weights(), list(self.averages.values())
        with torch.no_grad():
            weights = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, weights)
