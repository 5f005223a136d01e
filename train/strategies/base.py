"""What every strategy can do: the interface that the loop and the checkpoints use.

A strategy is the one object that the loop talks to for a step: it holds the model, the optimiser
and the loss scale, and knows how they are sharded. Subclass :class:`Strategy` anywhere and name
the class in the config: ``strategy=my_project.strategies:MyStrategy``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.checkpoint.state import OptimizerState
from train.data.plan import BatchPlan
from train.distributed.shard import Shard
from train.exits import UsageError
from train.optim.probe import KNOWN, Example, Updates, try_whole
from train.optim.spikes import Judge, Judgement, judge_finite
from train.section import Section
from train.strategies.buffers import BufferSync
from train.strategies.call_order import CallRecord
from train.strategies.engine import Engine
from train.strategies.loss_scale import LossScale
from train.strategies.meta_init import Initial
from train.strategies.model_call import ModelCall

T = TypeVar("T")
BuildOptimizer = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class StrategySetup:
    """What a strategy is made from."""

    engine: Engine
    name: str
    """What the config's ``strategy`` names, for messages."""
    options: Any
    """The config section that the class names in ``section``."""
    precision: str
    """fp32, bf16 or fp16: of forward and backward passes."""
    optimizer_name: str
    """The config's ``optim.use``, for messages."""
    plan: BatchPlan
    """How each step is divided into micro-batches."""
    blocks: list[nn.Module]
    """Modules whose parameters are gathered one module at a time."""
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    """The config's ``optim.options``."""
    initial: Initial | None = None
    """Draws the values of a model that is on the meta device; None for one that has values."""


class StepResult(NamedTuple):
    """The results of one optimiser step, as scalar fp32 tensors that stay on the device."""

    loss_sum: Tensor
    """The loss summed over the global batch."""
    grad_norm: Tensor
    """L2 norm of the gradient of the mean loss, before clipping."""
    skipped: Tensor
    """1.0 where the loss or the norm was not finite, or a spike, so that the weights did not
    change, else 0.0."""
    limits: Tensor | None = None
    """Shape (2,): above which mean loss and which norm the step is a spike; None where the run does
    not look for spikes."""


class Strategy(ABC):
    """A model and its optimiser, sharded or replicated over the ranks of an engine."""

    section: ClassVar[str] = "strategy_options"
    """The config section with the options of this strategy."""
    Options: ClassVar[type[Section]] = Section
    """Validates ``strategy_options``; for strategies from outside the package."""
    shards_parameters: ClassVar[bool] = False
    """Whether no rank ever needs to hold all parameters. Then a model that comes on the meta
    device is initialised by ``prepare``; otherwise it is initialised before."""

    bare_model: nn.Module
    """The model as the task built it, without wrappers."""
    model_call: ModelCall
    """The module around it that is wrapped."""
    wrapped: nn.Module
    """The outermost wrapper, or ``model_call``."""
    optimizer: Optimizer
    """Its ``param_groups`` hold the learning rate."""
    replicas = 1
    """Ranks that hold the same shard of a sharded parameter."""

    def __init__(self, setup: StrategySetup) -> None:
        self.setup, self.engine, self.options = setup, setup.engine, setup.options
        self.collectives = setup.engine.collectives
        self.loss_scale = LossScale() if setup.precision == "fp16" else None
        self._buffers: BufferSync | None = None
        self._frozen: dict[str, nn.Parameter] | None = None
        self._judge: Judge = judge_finite
        self._judgement: Judgement | None = None

    @staticmethod
    def kwargs_handlers(options: Any) -> Sequence[Any]:
        """What Accelerate must know of the strategy before there is a model."""
        return ()

    @abstractmethod
    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Takes over a model that is the same on every rank, and sets ``bare_model``,
        ``model_call``, ``wrapped`` and ``optimizer``. ``build_optimizer`` builds the optimiser of a
        model's parameters."""

    def run_directory_files(self) -> dict[str, Any]:
        """JSON values to be kept in the run directory, by file name."""
        return {}

    def check_optimizer(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Tries the optimiser on a small example of the model, before ``prepare``; collective where
        parameters are sharded. Raises UsageError where a checkpoint could not hold its state, or
        where it gives other results for shards."""
        name = self.setup.optimizer_name
        if name in KNOWN and not self.setup.optimizer_options:
            return
        example = Example(model, self.engine.device, self.engine.world_size)
        whole = try_whole(build_optimizer, example, name)
        if whole is None:
            return
        own = self.try_sharded(build_optimizer, example, whole)
        reason = next((r for r in self.collectives.all_gather_object(own) if r), None)
        if reason:
            raise UsageError(
                f"optim.use is {name!r}, which does not work with the strategy {self.setup.name}, "
                f"because that shards parameters ({reason}); use strategy=ddp, or optim.use=adamw."
            )

    def try_sharded(
        self, build_optimizer: BuildOptimizer, example: Example, whole: Updates
    ) -> str | None:
        """Why the optimiser does not make the updates ``whole`` of the example in the shards of
        this strategy; None where it does."""
        return None

    def call(self, function: Callable[[nn.Module], T]) -> T:
        """``function(bare_model)``, for any use of the model, in the run's precision; collective
        where parameters are sharded."""
        return self.model_call.through(self.model_call, function)

    def call_for_backward(self, function: Callable[[nn.Module], T]) -> T:
        """As ``call``; ``backward`` must follow, which exchanges gradients between ranks."""
        return self.model_call.through(self.wrapped, function)

    # -- a step ------------------------------------------------------------------------------

    @abstractmethod
    def zero_grad(self) -> None:
        """Drops the gradients of the step before; the first call of a step."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch. Ranks exchange gradients at the
        ``last`` one of a step."""

    def backward(self, loss_sum: Tensor, global_count: int) -> None:
        """Adds a micro-batch's part of the gradient of (global loss sum / ``global_count``).

        Strategies average gradients over the ranks, hence the factor world_size.
        """
        # A global batch without units gives NaN, so that all ranks skip the step.
        factor = self.engine.world_size / global_count if global_count else float("nan")
        if self.loss_scale:
            factor *= self.loss_scale.value
        self._backward(loss_sum * factor)

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss; they are averaged over the ranks."""

    def step(
        self,
        wait_for_loss_sum: Callable[[], Tensor],
        clip_norm: float | None,
        judge: Judge = judge_finite,
    ) -> StepResult:
        """Clips the gradients to the global L2 norm ``clip_norm`` and takes an optimiser step,
        unless ``judge`` skips it: by default where the loss or the norm is not finite.

        ``wait_for_loss_sum`` returns the global loss sum. It and the norm are the same on all
        ranks, so that all ranks skip the step or none does.
        """
        loss_sum = wait_for_loss_sum()
        self._refuse_unfrozen()
        self._judge, self._judgement = judge, None
        norm, skipped = self._update(loss_sum, clip_norm)
        if self._judgement is None and judge is not judge_finite:
            raise UsageError(
                f"optim.spike is set, but the strategy {self.setup.name} does not ask skip() "
                "whether to take a step; call it in _update(), or remove optim.spike."
            )
        if self.loss_scale:
            is_finite = torch.isfinite(norm + loss_sum)
            self.loss_scale.update(skipped=not is_finite.item())
        limits = self._judgement.limits if self._judgement else None
        return StepResult(loss_sum, norm, skipped, limits)

    def skip(self, loss_sum: Tensor, norm: Tensor) -> Tensor:
        """Whether the update must leave all weights as they are: 1.0 or 0.0, a scalar fp32 tensor
        on the device. ``_update`` calls it once, with the global loss sum and the global L2 norm of
        the gradients before clipping."""
        self._judgement = self._judge(loss_sum, norm)
        return self._judgement.skipped

    def _refuse_unfrozen(self) -> None:
        """Raises UsageError for a parameter that was frozen when the optimiser was built."""
        if self._frozen is None:
            named = self.bare_model.named_parameters()
            self._frozen = {name: p for name, p in named if not p.requires_grad}
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise UsageError(
                    f"{name} was frozen when the run started and is trainable now, but the "
                    "optimiser does not have it; let it be trainable in build_model(), and detach "
                    "it in the loss until it is to be trained."
                )

    @abstractmethod
    def _update(self, loss_sum: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        """The update of ``step``. Gradients are ``loss_scale.value`` times too large.

        Returns the global L2 norm of the gradients, and whether the step was skipped (1.0 or
        0.0), as scalar fp32 tensors on the device.
        """

    def norm_and_divisor(
        self,
        gradients: list[Tensor],
        clip_norm: float | None,
        *,
        sharded: bool,
        replicated: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """The global L2 norm of the gradients, without the loss scale, and the divisor that
        clips them (as torch.nn.utils.clip_grad_norm_) and removes the loss scale.

        ``gradients`` are those of this rank; with ``sharded``, other ranks have the rest, except
        of ``replicated``, which all ranks have. Computed in fp64, so that the norm does not depend
        on where tensors are split: a difference in its last bit would change every weight. Scalars
        on the device.
        """
        squares = self._sum_of_squares(gradients)
        if sharded:
            squares = self.collectives.all_reduce(squares) / self.replicas
        squares = squares + self._sum_of_squares(replicated)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        norm = squares.sqrt() / scale
        divisor = torch.full_like(norm, scale)
        if clip_norm is not None:
            # A NaN has no effect here: the step is skipped.
            divisor = divisor * torch.clamp((norm + 1e-6) / clip_norm, min=1.0)
        return norm, divisor

    def _sum_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """In fp64, on the device."""
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=self.engine.device)
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
        return torch.stack(norms).square().sum().to(self.engine.device)

    # -- buffers -----------------------------------------------------------------------------

    def sync_buffers(self) -> None:
        """Gives all ranks the persistent buffers of rank 0, such as the running statistics of a
        BatchNorm. Called before a step, an evaluation and a checkpoint."""
        if self._buffers is None:
            self._buffers = BufferSync(self.bare_model, self.collectives)
        self._buffers.sync()

    def undo_forward(self) -> None:
        """Restores the buffers as of ``sync_buffers``, for a step that is not completed."""
        if self._buffers is not None:
            self._buffers.restore()

    # -- shards, for checkpoints -------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Shard]:
        """This rank's shards of the parameters (fp32) and persistent buffers, by name. A tensor
        with several names appears under the first."""

    @abstractmethod
    def weights(self) -> dict[str, Shard]:
        """This rank's shards of the trainable parameters (fp32), by name, as the optimiser
        updates them. A shard may be empty. Call ``sync_weights`` after writing to them."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Copies what was written to the shards of ``weights`` into the model; collective."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state; empty before its first step."""

    @abstractmethod
    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """Allocates an optimiser state like ``stored``: by parameter name and state name, either
        a JSON value or a pair of shape and dtype. The caller fills the returned shards and then
        calls ``adopt_optimizer_state``."""

    @abstractmethod
    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """Makes the filled state the optimiser's."""

    # -- inspection --------------------------------------------------------------------------

    def gradients(self) -> dict[str, Shard]:
        """The clipped gradients of the last step, where the strategy still has them."""
        return {}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All trainable parameters and their gradients, one at a time and unsharded, named
        ``weights/<name>`` and ``gradients/<name>``; collective."""
        for kind, shards in (("weights", self.weights()), ("gradients", self.gradients())):
            for name, shard in shards.items():
                yield f"{kind}/{name}", self._gather(shard)

    def _gather(self, shard: Shard) -> Tensor:
        if shard.is_full:
            return shard.local
        full = torch.zeros(shard.shape, dtype=shard.dtype, device=self.engine.device)
        for (offsets, sizes), view in shard.chunks():
            window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            full[window] = view.to(full.device) / self.replicas
        return self.collectives.all_reduce(full)

    @cached_property
    def call_record(self) -> CallRecord:
        """Which of them this rank has called in this step."""
        modules = self.gathering_modules() if self.engine.world_size > 1 else {}
        return CallRecord(modules, self.model_call, self.collectives)

    def gathering_modules(self) -> dict[str, nn.Module]:
        """The modules whose calls gather parameters from all ranks, by name."""
        return {}

    def check_calls(self) -> None:
        """Raises UsageError on all ranks where these have called other modules since the record was
        cleared; collective."""
        if self.call_record.names:
            self.call_record.check(self.collectives.all_reduce_ints(self.call_record.numbers()))

    def check_unused(self) -> None:  # noqa: B027 (most strategies have nothing to check)
        """Raises UsageError for trainable parameters that got no gradient, where the strategy
        allows none; collective. Called before the first optimiser step."""
