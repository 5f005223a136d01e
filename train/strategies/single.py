"""One process that holds the whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from train.strategies.base import BuildOptimizer
from train.strategies.torch_native import TorchStrategy


class SingleStrategy(TorchStrategy):
    """The model on this rank's device; ranks exchange nothing."""

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Moves the model to the device and builds the optimiser."""
        self.model = self.bare_model = self.engine.on_device(model)
        self._build(build_optimizer)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """A context that does nothing: there are no gradients to exchange."""
        return nullcontext()
