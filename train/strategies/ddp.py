"""The full model on every rank (DistributedDataParallel)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from train.exits import UsageError
from train.strategies.base import BuildOptimizer
from train.strategies.model_call import ModelCall
from train.strategies.torch_native import TorchStrategy
from train.strategies.unused import accumulate_zeros


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
            self.bare_model = self.engine.on_device(model)
            self.model_call = ModelCall(self.bare_model, self.engine.autocast)
            self.wrapped = self.engine.accelerator.prepare_model(self.model_call)
        self._build(build_optimizer)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP's ``no_sync`` for all micro-batches but the last. A static graph does not support
        it; there, exchanging the accumulated gradients each time gives the same sum."""
        self._last = last
        if last or self.options.static_graph:
            return nullcontext()
        # Accelerate wraps no model for one process on a GPU; it knows what it has wrapped.
        context: AbstractContextManager[None] = self.engine.accelerator.no_sync(self.wrapped)
        return context

    def _backward(self, loss: Tensor) -> None:
        """DDP waits for a gradient of every parameter in the last backward pass of a step, unless
        it looks for unused ones itself, which takes longer."""
        options = self.options
        waits = self._last and not (options.find_unused_parameters or options.static_graph)
        before = [_state(p) for p in self._parameters] if waits else []
        super()._backward(loss)
        if self._last:
            self._missing = super()._unused()
        if waits:
            pairs = zip(self._parameters, before, strict=True)
            accumulate_zeros([p for p, earlier in pairs if _state(p) == earlier])

    def _unused(self) -> Iterable[str]:
        return self._missing


def _state(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Changes when a backward pass adds to the gradient. A gradient keeps its Python object."""
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), gradient._version)
