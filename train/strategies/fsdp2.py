"""Parameters, gradients and optimiser state cut over the ranks (torch's ``fully_shard``).

Called directly: Accelerate refuses FSDP without a GPU, and its wrapper adds nothing needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from train.exits import UsageError
from train.strategies.torch_native import TorchStrategy

_COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fsdp2Strategy(TorchStrategy):
    """Each rank holds an equal part of every parameter, as a DTensor."""

    cuts_parameters = True

    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> None:
        """Cuts blocks, then what is left, in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.refuse_optimizer("adafactor")
        options, engine = self.config.fsdp2, self.engine
        ranks, replicas = engine.world_size, options.replicas
        if ranks % replicas:
            raise UsageError(
                f"fsdp2.replicas is {replicas}, which does not divide the {ranks} ranks; use one "
                f"of {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}."
            )
        self.replicas = replicas
        shape: tuple[int, ...] = (ranks,)
        names: tuple[str, ...] = ("shard",)
        if replicas > 1:
            shape, names = (replicas, ranks // replicas), ("replicate", "shard")
        compute = _COMPUTE[self.config.precision] if options.gather_precision else None
        arguments: dict[str, Any] = {
            "mesh": init_device_mesh(engine.device.type, shape, mesh_dim_names=names),
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        }
        if options.cpu_offload:
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=engine.device.type == "cuda")
        model = engine.on_device(model, move=self.initial is None)
        for block in _without_shared(self.blocks, model):
            fully_shard(block, **arguments)
        fully_shard(model, **arguments)
        if self.initial:
            at = torch.device("cpu") if options.cpu_offload else engine.device
            self.initial.fill(model, at)
        self.model = self.bare_model = model
        self._build(build)

    def unused_remedy(self, *, alike: bool) -> str | None:
        """The exchange of a block fails where ranks differ in what they use of it."""
        return None if alike else "let the loss use the same ones on every rank"

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced at the last micro-batch only; until then each rank holds whole
        ones."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        self.model.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def undo_forward(self) -> None:
        """Parameters that the forward pass has gathered are cut again, too."""
        super().undo_forward()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _without_shared(blocks: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters no module outside of them uses. The others are gathered with
    the rest of the model: cut on their own, they would silently cease to be shared."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(p) for p in module._parameters.values() if p is not None)

    def alone(block: nn.Module) -> bool:
        inside = Counter(
            id(p) for m in block.modules() for p in m._parameters.values() if p is not None
        )
        return all(uses[key] == times for key, times in inside.items())

    return [block for block in blocks if alone(block)]
