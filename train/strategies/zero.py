"""DeepSpeed's ZeRO stages 1, 2 and 3 (Rajbhandari et al., 2020).

DeepSpeed is called directly, with a config that is generated in full from ours and the optimiser
that is ours. What it would do in its own way is kept from it: it never scales by the number of
micro-batches (``scale_wrt_gas``), never clips, never schedules, and has no loss scale. Parameters
and optimiser state stay fp32 and computation runs under autocast, as in the other strategies.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from train.checkpoint.state import OptimizerState
from train.distributed.shard import Shard, model_tensors
from train.exits import UsageError
from train.strategies.base import Strategy
from train.strategies.meta_init import Initial
from train.strategies.zero_config import STAGES, deepspeed_config


class ZeroStrategy(Strategy):
    """What the stages share."""

    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> None:
        """Hands model and optimiser to DeepSpeed."""
        self.refuse_optimizer("adafactor", "adagrad")  # DeepSpeed makes an Adagrad of its own
        deepspeed = import_deepspeed(self.engine.device)
        # DeepSpeed insists on it, also where nothing but Python started the one process.
        os.environ.setdefault("LOCAL_RANK", str(self.engine.world.local_rank))
        self.settings = deepspeed_config(
            self.config, STAGES[self.engine.strategy_name], self.engine.plan
        )
        if self.initial:
            self._cut_modules(deepspeed, model, self.initial)
        self.bare_model = self.engine.on_device(model, move=self.initial is None)
        self.optimizer = build(self.bare_model)
        try:
            self.deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=self.bare_model,
                optimizer=self.optimizer,
                config=self.settings,
                dist_init_required=False,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"DeepSpeed does not take zero.config: {'.'.join(map(str, first['loc']))} is "
                f"{first['input']!r} ({first['msg']}); correct it, or remove it."
            ) from None
        self.model = self.deepspeed
        self._watch()
        if self._zero.optimizer is not self.optimizer:
            raise UsageError(
                f"DeepSpeed has replaced the optimiser {self.config.optim.use!r} (optim.use) by "
                f"one of its own; choose adamw, adam, sgd, rmsprop, nadam or radam, or another "
                "strategy."
            )

    def _cut_modules(self, deepspeed: Any, model: nn.Module, initial: Initial) -> None:
        """For the stage that cuts parameters, and a model that comes on the meta device."""

    def files(self) -> dict[str, Any]:
        """The generated config."""
        return {"deepspeed.json": self.settings}

    def _watch(self) -> None:
        """Notes which parameters get a gradient, until the first step: DeepSpeed takes gradients
        away as soon as they are there."""
        self._used: set[str] = set()
        self._hooks: list[Any] = []
        for name, parameter in self.bare_model.named_parameters():
            if parameter.requires_grad:
                hook: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(hook(partial(self._note, name)))

    def _note(self, name: str, _parameter: Tensor) -> None:
        self._used.add(name)

    def unused(self) -> list[str]:
        """By the notes."""
        trainable = (n for n, p in self.bare_model.named_parameters() if p.requires_grad)
        return [name for name in trainable if name not in self._used]

    def unused_remedy(self, *, alike: bool) -> str | None:
        """A gradient of zero is not the same as none: weight decay goes on."""
        return "choose the strategy fsdp2"

    def zero_grad(self) -> None:
        """DeepSpeed has done so at the end of the step before."""

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Tells DeepSpeed where a step ends; stages 2 and 3 reduce at each micro-batch."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Unscaled by DeepSpeed: the loss comes as it is to be."""
        self._zero.override_loss_scale(1.0)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        """Norm and clipping are ours, so that they are the same as elsewhere to the last bit:
        DeepSpeed divides the gradients by what it takes for the loss scale. It skips a step whose
        gradients are not finite, so a loss that is not finite is put to it as a gradient."""
        while self._hooks:
            self._hooks.pop().remove()
        gradients = [g for part in self._gradients() for g in part]
        norm, divisor = self.norm_and_divisor(gradients, clip_norm, spread=True)
        finite = math.isfinite(norm.item() + loss_sum.item())
        if finite:
            self._zero.override_loss_scale(divisor.item())
        else:
            torch._foreach_mul_(gradients, float("nan"))
        self.deepspeed.step()
        assert self.deepspeed.was_step_applied() == finite, "DeepSpeed has decided otherwise"
        self._zero.override_loss_scale(1.0)
        skipped = torch.tensor(0.0 if finite else 1.0, device=self.engine.device)
        return norm.float(), skipped

    @abstractmethod
    def _flat_tensors(self) -> list[Tensor]:
        """What DeepSpeed gives the optimiser to change."""

    def _gradients(self) -> Iterator[list[Tensor]]:
        """This rank's share of the reduced gradients, by flat tensor."""
        for index, flat in enumerate(self._flat_tensors()):
            if flat.grad is not None:  # offloaded
                yield [flat.grad]
            else:
                yield [g for g in self._zero.averaged_gradients.get(index) or () if g is not None]

    def tensors(self) -> dict[str, Shard]:
        """The optimiser's fp32 shares; frozen parameters and buffers as the model has them."""
        weights = self.weights()
        return {
            name: weights.get(name) or self._other(tensor)
            for name, tensor in model_tensors(self.bare_model).items()
        }

    def _other(self, tensor: Tensor) -> Shard:
        """A frozen parameter, or a buffer."""
        return Shard.of(tensor)

    def weights(self) -> dict[str, Shard]:
        """Views of the optimiser's flat memory."""
        return {
            name: self._view(parameter, *self._place(parameter))
            for name, parameter in self.bare_model.named_parameters()
            if parameter.requires_grad
        }

    def _view(self, parameter: nn.Parameter, flat: Tensor, at: int, start: int, size: int) -> Shard:
        """Elements ``start`` and on of a parameter, lying from ``at`` on in flat memory."""
        return Shard(_shape(parameter), flat.detach().narrow(0, at, size), start=start)

    @abstractmethod
    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """Where a trainable parameter's fp32 elements lie on this rank: the flat tensor that
        the optimiser knows, the offset in it, the first element's index in the flattened
        parameter, and how many there are."""

    def optimizer_state(self) -> OptimizerState:
        """Views of the flat state; scalars are shared by all parameters of a flat tensor."""
        found: OptimizerState = {}
        for name, parameter in self.bare_model.named_parameters():
            if parameter.requires_grad:
                flat, *place = self._place(parameter)
                found[name] = {
                    key: value
                    if not isinstance(value, Tensor)
                    else Shard.of(value)
                    if value.shape != flat.shape
                    else self._view(parameter, value, *place)
                    for key, value in self.optimizer.state.get(flat, {}).items()
                }
        return found

    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """Flat zeros, with views of them to be filled."""
        for name, parameter in self.bare_model.named_parameters():
            if not parameter.requires_grad:
                continue
            flat, *_ = self._place(parameter)
            state = self.optimizer.state[flat]
            for key, value in stored.get(name, {}).items():
                if not isinstance(value, tuple):
                    state[key] = value
                elif key not in state:
                    shape, dtype = value
                    whole = shape == _shape(parameter)
                    # A scalar stays on the host unless the optimiser's kernel wants it beside.
                    on_device = whole or any(g.get("fused") for g in self.optimizer.param_groups)
                    state[key] = torch.zeros(
                        flat.shape if whole else shape,
                        dtype=dtype,
                        device=flat.device if on_device else "cpu",
                    )
        return self.optimizer_state()

    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """The optimiser holds it already."""


class PartitionedGradients(ZeroStrategy):
    """Stages 1 and 2: whole parameters everywhere; the optimiser's part of them is this rank's."""

    def prepare(self, model: nn.Module, build: Callable[[nn.Module], Optimizer]) -> None:
        """Also remembers which flat tensor each parameter went to."""
        super().prepare(model, build)
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
        if mapping is None:  # all of it is another rank's
            return flat, 0, 0, 0
        at, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, at.start, here.start, here.numel

    def sync_weights(self) -> None:
        """All ranks gather the parts that were written."""
        self._zero.update_lp_params()


class PartitionedParameters(ZeroStrategy):
    """Stage 3: the parameters are cut as well, and gathered when a module needs them."""

    cuts_parameters = True

    def _cut_modules(self, deepspeed: Any, model: nn.Module, initial: Initial) -> None:
        """A module's parameters are drawn, cut by DeepSpeed, and only then the next one's."""
        deepspeed.init_distributed(dist_init_required=False, verbose=False)  # it asks for ranks
        made: dict[int, nn.Parameter] = {}  # parameters that modules share stay shared
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

    def _flat_tensors(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, size = self._share(parameter, numel)
        return self._zero.fp32_partitioned_groups_flat[group], offset, start, size

    def _share(self, parameter: nn.Parameter, numel: int) -> tuple[int, int]:
        """First element and number of elements, less the padding at the end."""
        total = int(parameter.ds_numel)  # type: ignore[attr-defined]
        start = min(self.engine.rank * numel, total)
        return start, min(numel, total - start)

    def _other(self, tensor: Tensor) -> Shard:
        if not hasattr(tensor, "ds_tensor"):
            return Shard.of(tensor)
        local = tensor.ds_tensor.detach()
        start, size = self._share(tensor, local.numel())  # type: ignore[arg-type]
        return Shard(_shape(tensor), local.narrow(0, 0, size), start=start)

    def sync_weights(self) -> None:
        """Copies into the parameters' own memory; small ones that stay gathered are gathered
        anew."""
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, which stage 3 empties."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told of the device and kept from compiling and from talking.

    Raises UsageError where it is not installed.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It uses names that torch has new ones for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    try:
        import deepspeed  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            f"The ZeRO strategies need DeepSpeed, which cannot be imported ({error}); install it "
            "with `pip install 'isorun[deepspeed]'`, or choose the strategy fsdp2."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Shared memory between processes of a host, compiled at start for 40 s and not needed.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
