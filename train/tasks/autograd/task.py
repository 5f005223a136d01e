"""The task ``autograd``: fit a sine with an activation whose derivative is written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from train.section import Section
from train.tasks.base import Ratio, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

    from train.tasks.autograd.gradients import GradientStatistics


class AutogradTask(Task):
    """Fits y = sin(x); a batch is x and y, both (B, 1) float32."""

    class Model(Section):
        """A network with one hidden layer."""

        width: int = Field(16, ge=1)
        """Hidden units."""

    class Data(Section):
        """Points of the curve."""

        size: int = Field(2000, ge=2)
        """Points between -pi and pi."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._gradients: GradientStatistics | None = None

    def build_model(self) -> nn.Module:
        """The network, (B, 1) to (B, 1)."""
        from torch import nn

        from train.tasks.autograd.function import Legendre
        from train.tasks.autograd.gradients import GradientStatistics

        width = self.config.model.width
        # The norm keeps the inputs of the polynomial small.
        model = nn.Sequential(
            nn.Linear(1, width), nn.LayerNorm(width), Legendre(), nn.Linear(width, 1)
        )
        self._gradients = GradientStatistics()
        self._gradients.watch(model)
        return model

    def train_dataset(self) -> Dataset[Any]:
        """All points."""
        return self._points(self.config.data.size, 0.0)

    def eval_dataset(self) -> Dataset[Any]:
        """Points in between."""
        return self._points(self.config.data.size // 2, 0.5)

    @staticmethod
    def _points(number: int, shift: float) -> Dataset[Any]:
        import math

        import torch
        from torch.utils.data import TensorDataset

        x = ((torch.arange(number) + shift) / number * 2 - 1)[:, None] * math.pi
        return TensorDataset(x, x.sin())

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """The squared error, summed over the points."""
        x, y = batch
        return Ratio((model(x) - y).square().sum(), len(x))

    def report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """``gradients``: those of the last training step, by module, as text."""
        return {"gradients": self._gradients.table()} if self._gradients else {}
