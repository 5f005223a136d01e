"""What every strategy can do; the rest of ``train`` knows nothing more of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.checkpoint.state import OptimizerState
from train.distributed.shard import Shard
from train.exits import UsageError

if TYPE_CHECKING:
    from train.config.schema import Config
    from train.strategies.engine import Engine
    from train.strategies.meta_init import Initial


class Strategy(ABC):
    """A model and its optimiser, spread over the ranks of an engine."""

    model: nn.Module
    """What a task's loss calls."""
    bare_model: nn.Module
    """The same without wrappers: its parameters bear their own names."""
    optimizer: Optimizer
    """Whose ``param_groups`` hold the learning rate."""
    initial: Initial | None = None
    """Draws the values of a model that comes on the meta device, of a strategy that
    ``cuts_parameters``; to others it comes with them."""
    cuts_parameters = False
    """Whether no rank need hold all parameters at any time."""
    replicas = 1
    """Ranks that hold the same share of a parameter that is cut."""

    def __init__(self, engine: Engine, config: Config, blocks: list[nn.Module]) -> None:
        self.engine, self.config, self.blocks = engine, config, blocks
        self._buffers: list[Tensor] | None = None
        self._synced: list[tuple[Tensor, list[Tensor]]] = []

    @abstractmethod
    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> None:
        """Takes over a model that is the same on every rank; ``build`` makes the optimiser of a
        model's parameters."""

    def files(self) -> dict[str, Any]:
        """What is worth keeping in the run directory, as JSON, by file name."""
        return {}

    def refuse_optimizer(self, *names: str) -> None:
        """Raises UsageError where the run's optimiser is one of those that look at more than one
        element at a time, and so at more than a rank may have."""
        if self.config.optim.use in names:
            raise UsageError(
                f"optim.use is {self.config.optim.use!r}, which does not go with the strategy "
                f"{self.engine.strategy_name}, since that cuts parameters into pieces; use the "
                "strategy ddp, or adamw."
            )

    # -- a step ------------------------------------------------------------------------------

    @abstractmethod
    def zero_grad(self) -> None:
        """Forgets gradients, as the first thing of a step."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; at the ``last`` of a step, gradients
        are exchanged."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, which are averaged over the ranks."""

    @abstractmethod
    def update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        """Clips the gradients and lets the optimiser step, unless they or ``loss_sum`` (global)
        are not finite. The gradients are ``engine.loss_scale`` times too large.

        Returns the gradients' global L2 norm, and whether the step was skipped (1.0) or not, as
        scalar fp32 tensors on the device.
        """

    def norm_and_divisor(
        self, gradients: list[Tensor], clip_norm: float | None, *, spread: bool
    ) -> tuple[Tensor, Tensor]:
        """The global L2 norm of gradients (without the loss scale), and what they are to be
        divided by to clip them (torch.nn.utils.clip_grad_norm_) and to take the loss scale out.

        ``gradients`` is all that this rank has of them; ``spread`` says that other ranks have the
        rest. In fp64, so that it is the same number wherever the tensors were cut: a difference
        in its last bit would change every weight. Scalars on the device.
        """
        device = self.engine.device
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
            squares = torch.stack(norms).square().sum().to(device)
        if spread:
            squares = self.engine.sum(squares) / self.replicas
        scale = self.engine.loss_scale.value if self.engine.loss_scale else 1.0
        norm = squares.sqrt() / scale
        divisor = torch.full_like(norm, scale)
        if clip_norm is not None:
            # A NaN harms nothing: the step is skipped.
            divisor = divisor * torch.clamp((norm + 1e-6) / clip_norm, min=1.0)
        return norm, divisor

    # -- what is spread ----------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Shard]:
        """Parameters and persistent buffers by name, those with several names only once."""

    @abstractmethod
    def weights(self) -> dict[str, Shard]:
        """The trainable parameters by name as the optimiser changes them (fp32). Whoever writes
        to their memory calls ``sync_weights`` afterwards. Also those this rank has nothing of."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Makes what was written to the memory of ``weights`` the model's; collective."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state; empty before its first step."""

    @abstractmethod
    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """Gives the optimiser a state like the stored one: by parameter and state name, a JSON
        value or a pair of shape and dtype. The shares returned for pairs are to be filled; then
        ``adopt_optimizer_state`` is to be called."""

    @abstractmethod
    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """Takes the filled state into use."""

    def gradients(self) -> dict[str, Shard]:
        """The clipped gradients of the step just taken, where the strategy still has them."""
        return {}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All trainable parameters and their gradients, one at a time, whole; collective."""
        for kind, shards in (("weights", self.weights()), ("gradients", self.gradients())):
            for name, shard in shards.items():
                yield f"{kind}/{name}", self._whole(shard)

    def _whole(self, shard: Shard) -> Tensor:
        if shard.is_full:
            return shard.local
        whole = torch.zeros(shard.shape, dtype=shard.dtype, device=self.engine.device)
        for (offsets, sizes), view in shard.chunks():
            window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[window] = view.to(whole.device) / self.replicas
        return self.engine.sum(whole)

    def sync_buffers(self) -> None:
        """Gives every rank rank 0's persistent buffers, such as a BatchNorm's running statistics:
        before a step, an evaluation and a checkpoint, so that they agree wherever they count."""
        if self._buffers is None:
            kept = self.bare_model.state_dict(keep_vars=True)
            self._buffers = [b for name, b in self.bare_model.named_buffers() if name in kept]
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._buffers:
            by_kind.setdefault(buffer.dtype, []).append(buffer.detach())
        self._synced = []
        for buffers in by_kind.values():
            joined = torch.cat([buffer.flatten() for buffer in buffers])
            self._synced.append((joined, buffers))
            if self.engine.world_size > 1:
                self.engine.broadcast_tensor(joined)
                _part(joined, buffers)

    def undo_forward(self) -> None:
        """For a step that is given up: buffers are again what ``sync_buffers`` left."""
        for joined, buffers in self._synced:
            _part(joined, buffers)

    def unused_remedy(self, *, alike: bool) -> str | None:
        """None where parameters that the loss does not use are as good as frozen, else what can
        be done besides freezing them. ``alike``: all ranks use the same ones."""
        return None

    def unused(self) -> list[str]:
        """Names of trainable parameters that got no gradient from this rank's backward passes,
        before the optimiser's first step."""
        return [
            name
            for name, parameter in self.bare_model.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]


def _part(joined: Tensor, tensors: list[Tensor]) -> None:
    """Overwrites tensors with what was joined from such."""
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
