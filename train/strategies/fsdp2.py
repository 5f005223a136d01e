"""Parameters, gradients and optimiser state sharded over the ranks (torch's ``fully_shard``).

``fully_shard`` is called directly: Accelerate refuses FSDP without a GPU, and its wrapper adds
nothing that is needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from train.exits import UsageError
from train.strategies.base import BuildOptimizer
from train.strategies.parameters import make_contiguous
from train.strategies.torch_native import TorchStrategy

_COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fsdp2Strategy(TorchStrategy):
    """Each rank holds an equal shard of every parameter, as a DTensor."""

    section: ClassVar[str] = "fsdp2"
    shards_parameters: ClassVar[bool] = True

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Shards the blocks, then the rest of the model, in place. Raises UsageError where
        ``fsdp2.replicas`` does not divide the world size."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.refuse_optimizer("adafactor")
        options, engine, initial = self.options, self.engine, self.setup.initial
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
        compute = _COMPUTE[self.setup.precision] if options.gather_precision else None
        arguments: dict[str, Any] = {
            "mesh": init_device_mesh(engine.device.type, shape, mesh_dim_names=names),
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        }
        if options.cpu_offload:
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=engine.device.type == "cuda")
        model = engine.on_device(model, move=initial is None)
        make_contiguous(model)
        self._scalars = [p for p in model.parameters() if not p.dim()]
        arguments["ignored_params"] = set(self._scalars)
        for block in _without_shared(self.setup.blocks, model):
            fully_shard(block, **arguments)
        fully_shard(model, **arguments)
        if initial:
            initial.fill(model, torch.device("cpu") if options.cpu_offload else engine.device)
        self.model = self.bare_model = model
        self._build(build_optimizer)

    def unused_remedy(self, *, alike: bool) -> str | None:
        """The exchange of a block fails where ranks use different parameters of it."""
        return None if alike else "let the loss use the same parameters on every rank"

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Reduces gradients at the last micro-batch only; until then each rank holds unsharded
        gradients."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        self.model.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def _update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        self._average_scalar_gradients()
        return super()._update(loss_sum, clip_norm)

    def _average_scalar_gradients(self) -> None:
        """``fully_shard`` takes no parameter without dimensions: each rank holds it in full."""
        trained = [parameter for parameter in self._scalars if parameter.requires_grad]
        if not trained:
            return
        zero = torch.zeros((), device=self.engine.device)
        values = [zero if p.grad is None else p.grad.to(zero) for p in trained]
        used = [zero if p.grad is None else zero + 1 for p in trained]
        summed = self.collectives.all_reduce(torch.stack([*values, *used]))
        averages = summed[: len(trained)] / self.engine.world_size
        for parameter, average, uses in zip(
            trained, averages, summed[len(trained) :].tolist(), strict=True
        ):
            if uses:
                parameter.grad = average.to(parameter)

    def undo_forward(self) -> None:
        """Also frees the parameters that the forward pass has gathered."""
        super().undo_forward()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _without_shared(blocks: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters no module outside of them uses. The others stay in the model's
    own group: ``fully_shard`` on them would silently untie the shared parameters."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(p) for p in module._parameters.values() if p is not None)

    def alone(block: nn.Module) -> bool:
        inside = Counter(
            id(p) for m in block.modules() for p in m._parameters.values() if p is not None
        )
        return all(uses[key] == times for key, times in inside.items())

    return [block for block in blocks if alone(block)]
