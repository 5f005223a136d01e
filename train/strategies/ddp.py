"""One process, or several with all of the model each (DistributedDataParallel)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from train.exits import UsageError
from train.strategies.torch_native import TorchStrategy

if TYPE_CHECKING:
    from accelerate.utils import DistributedDataParallelKwargs

    from train.strategies.strategy_config import DdpConfig


class SingleStrategy(TorchStrategy):
    """One process, or several that only evaluate."""

    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer] | None) -> None:
        """Moves the model to the device."""
        self.model = self.bare_model = self.engine.on_device(model)
        if build:
            self._build(build)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is exchanged."""
        return nullcontext()


class DdpStrategy(TorchStrategy):
    """All of the model on every rank; gradients are averaged while backward runs."""

    @staticmethod
    def accelerate_options(config: DdpConfig) -> DistributedDataParallelKwargs:
        """The options as Accelerate, which wraps the model, takes them."""
        from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

        return DistributedDataParallelKwargs(
            broadcast_buffers=False,  # once per step, as with every strategy: sync_buffers
            bucket_cap_mb=config.bucket_cap_mb,
            static_graph=config.static_graph,
            gradient_as_bucket_view=config.gradient_as_bucket_view,
            find_unused_parameters=config.find_unused_parameters,
            comm_hook=DDPCommunicationHookType(
                "no" if config.comm_hook == "none" else config.comm_hook
            ),
        )

    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> None:
        """Wraps the model. Raises UsageError for an exchange that the backend cannot do."""
        if self.config.ddp.comm_hook == "bf16" and self.engine.device.type == "cpu":
            raise UsageError(
                "ddp.comm_hook is 'bf16', which needs GPUs, and there are none here; use none."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            self.model = self.engine.accelerator.prepare_model(model)
        # Accelerate's own unwrap_model would import DeepSpeed.
        self.bare_model = self.model.module  # type: ignore[assignment]
        self._build(build)

    def unused_remedy(self, *, alike: bool) -> str | None:
        """DDP waits for the gradient of every parameter, unless it is told to look."""
        options = self.config.ddp
        if options.find_unused_parameters or options.static_graph:
            return None
        return "set ddp.find_unused_parameters=true"

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP's own ``no_sync`` but at the last one. A static graph does not bear it; to exchange
        what has been added up so far each time gives the same sum."""
        if last or self.config.ddp.static_graph:
            return nullcontext()
        return self.model.no_sync()  # type: ignore[operator, no-any-return]
