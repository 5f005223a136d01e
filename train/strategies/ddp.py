"""The full model on every rank (DistributedDataParallel)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import nn

from train.exits import UsageError
from train.strategies.base import BuildOptimizer
from train.strategies.torch_native import TorchStrategy


class DdpStrategy(TorchStrategy):
    """The full model on every rank; gradients are averaged while backward runs."""

    section: ClassVar[str] = "ddp"

    @staticmethod
    def kwargs_handlers(options: Any) -> Sequence[Any]:
        """The options in the form that Accelerate takes; it wraps the model."""
        from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

        hook = "no" if options.comm_hook == "none" else options.comm_hook
        return [
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # sync_buffers does, as with every strategy
                bucket_cap_mb=options.bucket_cap_mb,
                static_graph=options.static_graph,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                find_unused_parameters=options.find_unused_parameters,
                comm_hook=DDPCommunicationHookType(hook),
            )
        ]

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Wraps the model. Raises UsageError for a comm_hook that the backend does not support."""
        if self.options.comm_hook == "bf16" and self.engine.device.type == "cpu":
            raise UsageError(
                "ddp.comm_hook is 'bf16', which needs GPUs, but this machine has none; set "
                "ddp.comm_hook=none."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            self.model = self.engine.accelerator.prepare_model(model)
        # Not Accelerate's unwrap_model: it imports DeepSpeed.
        self.bare_model = self.model.module  # type: ignore[assignment]
        self._build(build_optimizer)

    def unused_remedy(self, *, alike: bool) -> str | None:
        """DDP waits for the gradient of every parameter, unless it looks for unused ones."""
        options = self.options
        if options.find_unused_parameters or options.static_graph:
            return None
        return "set ddp.find_unused_parameters=true"

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP's ``no_sync`` for all micro-batches but the last. A static graph does not support
        it; there, exchanging the accumulated gradients each time gives the same sum."""
        if last or self.options.static_graph:
            return nullcontext()
        return self.model.no_sync()  # type: ignore[operator, no-any-return]
