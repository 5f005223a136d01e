"""The stages of ZeRO: where the parameters and the optimiser's flat tensors are on each rank."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from train.distributed.shard import Shard
from train.exits import UsageError
from train.strategies.base import BuildOptimizer
from train.strategies.meta_init import Initial
from train.strategies.zero import ZeroStrategy, full_shape


class Zero1Strategy(ZeroStrategy):
    """Stage 1: full parameters on every rank; the optimiser updates this rank's shard of them."""

    stage: ClassVar[int] = 1

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Also records which flat tensor holds each parameter."""
        super().prepare(model, build_optimizer)
        self._group = {
            id(parameter): index
            for index, group in enumerate(self._zero.bit16_groups)
            for parameter in group
        }

    def _flat_tensors(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        flat = self._zero.single_partition_of_fp32_groups[self._group[id(parameter)]]
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # it belongs to other ranks
            return flat, 0, 0, 0
        at, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, at.start, here.start, here.numel

    def sync_weights(self) -> None:
        """Gathers the shards of all ranks into the model's parameters."""
        self._zero.update_lp_params()


class Zero2Strategy(Zero1Strategy):
    """Stage 2: as stage 1, and each rank keeps its shard of the gradients only."""

    stage: ClassVar[int] = 2


class Zero3Strategy(ZeroStrategy):
    """Stage 3: parameters are sharded as well, and gathered when a module needs them."""

    stage: ClassVar[int] = 3
    shards_parameters: ClassVar[bool] = True

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Also shows scalars to DeepSpeed, which takes none, as vectors of one element. Raises
        UsageError for a compiled module, whose parameters DeepSpeed cannot gather."""
        compiled = (n for n, m in model.named_modules() if isinstance(m, OptimizedModule))
        for name in compiled:
            raise UsageError(
                f"{name or 'The model'} is compiled by torch.compile(), which strategy=zero3 does "
                "not support inside a model; leave it uncompiled and set compile=true, or use "
                "strategy=fsdp2."
            )
        scalars = [name for name, p in model.named_parameters() if not p.dim()]
        for name in scalars:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.view(1)
        super().prepare(model, build_optimizer)
        for name in scalars:
            parameter = model.get_parameter(name)
            parameter.ds_shape = torch.Size()  # type: ignore[attr-defined]
            if parameter.numel():  # it is on this rank
                parameter.data = parameter.data.view(())

    def _shard_modules(self, deepspeed: Any, model: nn.Module, initial: Initial) -> None:
        """Initialises and shards one module before the next, so that no rank holds the model."""
        deepspeed.init_distributed(dist_init_required=False, verbose=False)  # zero.Init needs it
        made: dict[int, nn.Parameter] = {}  # shared parameters stay shared
        for name, drawn in initial.modules():
            module, holder = model.get_submodule(name), nn.Module()
            for key, parameter in module._parameters.items():
                value = drawn._parameters[key]
                if parameter is None or value is None:
                    continue
                if id(parameter) not in made:
                    value.requires_grad_(parameter.requires_grad)
                    made[id(parameter)] = value
                    holder.register_parameter(key, value)
                module._parameters[key] = made[id(parameter)]
            for key, buffer in drawn._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.engine.device)
            deepspeed.zero.Init(
                module=holder, config_dict_or_path=self.settings, dtype=torch.float32
            )

    def gathering_modules(self) -> dict[str, nn.Module]:
        """All modules with parameters of their own."""
        return {name: m for name, m in self.bare_model.named_modules() if m._parameters}

    def _flat_tensors(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, size = self._share(parameter, numel)
        return self._zero.fp32_partitioned_groups_flat[group], offset, start, size

    def _share(self, parameter: nn.Parameter, numel: int) -> tuple[int, int]:
        """The first element and the number of elements of this rank, without the padding."""
        total = int(parameter.ds_numel)  # type: ignore[attr-defined]
        start = min(self.engine.rank * numel, total)
        return start, min(numel, total - start)

    def _other(self, tensor: Tensor) -> Shard:
        if not hasattr(tensor, "ds_tensor"):
            return Shard.of(tensor)
        local = tensor.ds_tensor.detach()
        start, size = self._share(tensor, local.numel())  # type: ignore[arg-type]
        return Shard(full_shape(tensor), local.narrow(0, 0, size), start=start)

    def sync_weights(self) -> None:
        """Copies the shards into the model's parameters, and gathers those that DeepSpeed keeps
        gathered."""
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
