"""An exponential moving average of the weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from train.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from train.distributed.shard import Shard


class ShardedWeights(Protocol):
    """A model whose trainable parameters are sharded over the ranks."""

    def weights(self) -> dict[str, Shard]:
        """This rank's shard of each trainable parameter, by name."""

    def sync_weights(self) -> None:
        """Copies the shards to the parameters that the forward pass uses; collective."""


class EmaConfig(Section):
    """Keep an average of the weights, and evaluate and export it instead of the weights."""

    decay: float = Field(0.999, gt=0.0, lt=1.0)
    """After each step that is not skipped: average = decay * average + (1 - decay) * weights."""


class Ema:
    """The averages of this rank's shards of the trainable parameters, fp32, on the same device."""

    def __init__(self, config: EmaConfig, strategy: ShardedWeights) -> None:
        self.decay = config.decay
        self.strategy = strategy
        self.averages: dict[str, Shard] = {
            name: shard.with_local(shard.local.clone())
            for name, shard in strategy.weights().items()
        }

    def update(self, skipped: Tensor) -> None:
        """Updates the averages after a step, unless it was skipped. Does not synchronise the
        device.

        ``skipped``: a scalar tensor on the device, 1.0 for a skipped step, else 0.0.
        """
        import torch

        averages = self._averages()
        weight = (1.0 - self.decay) * (1.0 - skipped)
        with torch.no_grad():
            # _foreach_lerp_ would read the weight on the host.
            changes = torch._foreach_sub(self._weights(), averages)
            torch._foreach_mul_(changes, weight.to(averages[0]))
            torch._foreach_add_(averages, changes)

    def restart(self) -> None:
        """Makes the present weights the averages."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(self._averages(), self._weights())

    def _averages(self) -> list[Tensor]:
        return [shard.local for shard in self.averages.values()]

    def _weights(self) -> list[Tensor]:
        return [shard.local for shard in self.strategy.weights().values()]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context manager that replaces the model's weights by the averages; collective.

        After an error, what ``sync_weights`` copies to still holds the averages.
        """
        import torch

        weights = self._weights()
        saved = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self._averages())
        self.strategy.sync_weights()
        try:
            yield
        except BaseException:
            torch._foreach_copy_(weights, saved)  # other ranks may not have failed
            raise
        torch._foreach_copy_(weights, saved)
        self.strategy.sync_weights()
