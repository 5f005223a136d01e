"""DeepSpeed's ZeRO stages 1, 2 and 3 (Rajbhandari et al., 2020).

DeepSpeed is called directly, with a config that is generated in full from this run's config and
with this run's optimiser. Everything that would change the result is turned off in it: scaling by
the number of micro-batches (``scale_wrt_gas``), clipping, schedules and loss scaling. Parameters
and optimiser state stay fp32 and computation runs under autocast, as in the other strategies.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from train.checkpoint.state import OptimizerState
from train.distributed.shard import Shard, model_tensors
from train.exits import UsageError
from train.optim.probe import Example, Updates, check_flat
from train.strategies.base import BuildOptimizer, Strategy
from train.strategies.deepspeed_import import import_deepspeed
from train.strategies.meta_init import Initial
from train.strategies.model_call import ModelCall
from train.strategies.parameters import make_contiguous, trainable_parameters
from train.strategies.unused import not_reached
from train.strategies.zero_config import deepspeed_config
from train.suggest import listed


class ZeroStrategy(Strategy):
    """The part that all stages share."""

    section: ClassVar[str] = "zero"
    stage: ClassVar[int]

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Hands the model and the optimiser to DeepSpeed. Raises UsageError where DeepSpeed is
        not installed, or does not accept its options or the optimiser."""
        deepspeed = import_deepspeed(self.engine.device)
        on_gpu = self.engine.device.type == "cuda"
        self.settings = deepspeed_config(self.options, self.stage, self.setup.plan, on_gpu=on_gpu)
        initial = self.setup.initial
        if initial:
            self._shard_modules(deepspeed, model, initial)
        self.bare_model = self.engine.on_device(model, move=initial is None)
        make_contiguous(model)
        self.model_call = ModelCall(self.bare_model, self.engine.autocast)
        self.optimizer = build_optimizer(self.bare_model)
        try:
            with _without_broadcast(deepspeed.DeepSpeedEngine):
                self.deepspeed, self._zero, _, _ = deepspeed.initialize(
                    model=self.model_call,
                    optimizer=self.optimizer,
                    config=self.settings,
                    dist_init_required=False,
                )
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"DeepSpeed does not accept zero.config: {'.'.join(map(str, first['loc']))} is "
                f"{first['input']!r} ({first['msg']}); correct it, or remove it."
            ) from None
        self.wrapped = self.deepspeed
        self._watch_gradients()
        if self._zero.optimizer is not self.optimizer:
            raise UsageError(
                f"optim.use is {self.setup.optimizer_name!r}, which DeepSpeed replaces by an "
                "optimiser of its own; use adamw, adam, sgd, rmsprop, nadam or radam, or another "
                "strategy."
            )

    def _shard_modules(self, deepspeed: Any, model: nn.Module, initial: Initial) -> None:
        """Initialises a model on the meta device, in the stage that shards parameters."""

    def try_sharded(
        self, build_optimizer: BuildOptimizer, example: Example, whole: Updates
    ) -> str | None:
        """Each rank has a part of a flat tensor with all parameters."""
        return check_flat(build_optimizer, example, whole, self.engine.world_size)

    def run_directory_files(self) -> dict[str, Any]:
        """The generated DeepSpeed config, ``deepspeed.json``."""
        return {"deepspeed.json": self.settings}

    def _watch_gradients(self) -> None:
        """Records which parameters get a gradient, until the first step: DeepSpeed removes
        gradients as soon as it has reduced them."""
        self._used: set[str] = set()
        self._hooks: list[Any] = []
        self._trainable = trainable_parameters(self.bare_model)
        for name, parameter in self._trainable.items():
            hook: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(hook(partial(self._record_gradient, name)))

    def _record_gradient(self, name: str, _parameter: Tensor) -> None:
        self._used.add(name)

    def check_unused(self) -> None:
        """Finds those that the autograd graph did not show."""
        self._refuse_unused([name for name in self._trainable if name not in self._used])

    def _refuse_unused(self, names: Sequence[str]) -> None:
        """Raises UsageError on all ranks where any rank gives a name; collective.

        DeepSpeed's optimiser updates flat tensors, so momentum and weight decay would change
        parameters without a gradient; stage 3 would use the gradient of an earlier step for them;
        and it adds up gradients in the order in which they come, which must be the same on all
        ranks.
        """
        number, *sums = self.collectives.all_reduce_ints([len(names), *self.call_record.numbers()])
        self.call_record.check(sums)
        if not number:
            return
        by_rank = self.collectives.all_gather_object(list(names))
        rank = next(rank for rank, unused in enumerate(by_rank) if unused)
        everywhere = all(unused == by_rank[rank] for unused in by_rank)
        where = "" if everywhere else f" on rank {rank}"
        raise UsageError(
            f"{listed(by_rank[rank])} got no gradient from a micro-batch{where}, which the "
            f"strategy {self.setup.name} does not allow for trainable parameters; freeze "
            "them (requires_grad_(False)), use them in each micro-batch, or use strategy=fsdp2 or "
            "ddp."
        )

    def zero_grad(self) -> None:
        """DeepSpeed drops gradients itself, at the end of each step."""
        self.call_record.clear()

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Tells DeepSpeed which micro-batch is the last of a step. Stages 2 and 3 reduce
        gradients at each micro-batch."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self._refuse_unused(not_reached(loss, self._trainable.items()))
        # The loss is scaled already.
        self._zero.override_loss_scale(1.0)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def _update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        # The norm and the clipping are this package's, so that they are bitwise those of the other
        # strategies: DeepSpeed divides the gradients by what it is given as its loss scale.
        while self._hooks:
            self._hooks.pop().remove()
        gradients = [g for part in self._gradients() for g in part]
        self._wait_for_copies(gradients)
        norm, divisor = self.norm_and_divisor(gradients, clip_norm, sharded=True)
        norm = norm.float()
        skipped = self.skip(loss_sum, norm)
        taken = not skipped.item()
        if taken:
            self._zero.override_loss_scale(divisor.item())
        else:
            self._make_skip(gradients)
        self.deepspeed.step()
        assert self.deepspeed.was_step_applied() == taken, "DeepSpeed skipped otherwise"
        self._zero.override_loss_scale(1.0)
        return norm, skipped

    def _make_skip(self, gradients: list[Tensor]) -> None:
        """Makes DeepSpeed skip the step, as it does if it finds that gradients are not finite: they
        may be finite where the loss is not, and at a spike."""
        if all(flat.grad is None for flat in self._flat_tensors()):
            torch._foreach_mul_(gradients, float("nan"))
            return
        # With offload_optimizer, it reads the norms that it has computed before it copied the
        # gradients to these, whose padding keeps what is written to it.
        norms = self._zero.norm_for_param_grads
        for parameter, norm in norms.items():
            norms[parameter] = torch.full_like(norm, float("nan"))

    def _wait_for_copies(self, gradients: Sequence[Tensor]) -> None:
        """With ``offload_optimizer``, DeepSpeed copies gradients to the host without waiting, and
        on a stream of its own."""
        device = self.engine.device
        if device.type == "cuda" and any(g.device.type == "cpu" for g in gradients):
            torch.cuda.synchronize(device)

    @abstractmethod
    def _flat_tensors(self) -> list[Tensor]:
        """The flat fp32 tensors that DeepSpeed has given to the optimiser as parameters."""

    def _gradients(self) -> Iterator[list[Tensor]]:
        """This rank's shards of the reduced gradients, one list per flat tensor."""
        for index, flat in enumerate(self._flat_tensors()):
            if flat.grad is not None:  # with offload_optimizer
                yield [flat.grad]
            else:
                yield [g for g in self._zero.averaged_gradients.get(index) or () if g is not None]

    def tensors(self) -> dict[str, Shard]:
        """The optimiser's fp32 shards; frozen parameters and buffers as the model has them."""
        weights = self.weights()
        return {
            name: weights.get(name) or self._other(tensor)
            for name, tensor in model_tensors(self.bare_model).items()
        }

    def _other(self, tensor: Tensor) -> Shard:
        """The shard of a frozen parameter or a buffer."""
        return Shard.of(tensor)

    def weights(self) -> dict[str, Shard]:
        """Views of the optimiser's flat memory."""
        return {
            name: self._view(parameter, *self._place(parameter))
            for name, parameter in self.bare_model.named_parameters()
            if parameter.requires_grad
        }

    def _view(self, parameter: nn.Parameter, flat: Tensor, at: int, start: int, size: int) -> Shard:
        """``size`` elements of a parameter from ``start`` on, at offset ``at`` of ``flat``."""
        return Shard(full_shape(parameter), flat.detach().narrow(0, at, size), start=start)

    @abstractmethod
    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """The place of a trainable parameter's fp32 elements on this rank: the optimiser's flat
        tensor, the offset in it, the index of the first element in the flattened parameter, and
        the number of elements."""

    def optimizer_state(self) -> OptimizerState:
        """Views of the flat state. All parameters of a flat tensor share its scalars."""
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
        """Allocates flat zeros and returns views of them."""
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
                    elementwise = shape == full_shape(parameter)
                    # A scalar stays on the host, unless a fused kernel needs it on the device.
                    fused = any(g.get("fused") for g in self.optimizer.param_groups)
                    on_device = elementwise or fused
                    state[key] = torch.zeros(
                        flat.shape if elementwise else shape,
                        dtype=dtype,
                        device=flat.device if on_device else "cpu",
                    )
        return self.optimizer_state()

    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """Nothing to do: the optimiser holds the state that was filled."""


@contextmanager
def _without_broadcast(engine: Any) -> Iterator[None]:
    """Keeps DeepSpeed from sending rank 0's weights to all ranks: they have them, and it fails for
    parameters without dimensions."""
    broadcast = engine._broadcast_model
    engine._broadcast_model = lambda _: None
    try:
        yield
    finally:
        engine._broadcast_model = broadcast


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the full parameter. In stage 3 the parameter itself is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
