"""One process that holds the whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from train.exits import UsageError
from train.strategies.base import BuildOptimizer
from train.strategies.model_call import ModelCall
from train.strategies.torch_native import TorchStrategy


class SingleStrategy(TorchStrategy):
    """The model on this rank's device; for one rank."""

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Moves the model to the device and builds the optimiser. Raises UsageError on several
        ranks, each of which would train a model of its own."""
        if self.engine.world_size > 1:
            raise UsageError(
                f"strategy is {self.setup.name!r}, which exchanges no gradients, but there are "
                f"{self.engine.world_size} ranks; set strategy=ddp or another that does."
            )
        self.bare_model = self.engine.on_device(model)
        self.wrapped = self.model_call = ModelCall(self.bare_model, self.engine.autocast)
        self._build(build_optimizer)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """A context that does nothing: there are no gradients to exchange."""
        return nullcontext()
