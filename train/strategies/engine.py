"""The engine: everything that depends on how many processes there are and on what device.

All reductions, all decisions that ranks must share and all work that must happen only once go
through here, so that the rest of ``train`` reads as if there were one process. Accelerate starts
the process group, runs mixed precision and wraps the model for DDP; its data loading, scheduler,
accumulation, clipping and checkpointing are not used, since they make the result depend on the
placement. How the model is spread over the ranks is the strategy's (:mod:`train.strategies`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.distributed.process_group import start_group, timeout_of
from train.distributed.randomness import make_deterministic
from train.distributed.world import this_world
from train.exits import RetryError, UsageError
from train.strategies.loss_scale import LossScale

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from train.config.schema import Config
    from train.data.plan import BatchPlan
    from train.strategies.base import Strategy
    from train.strategies.meta_init import Initial

T = TypeVar("T")
_TO_WRITE = timedelta(hours=1)
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class StepResult(NamedTuple):
    """What one optimiser step gave, as scalar fp32 tensors that stay on the device."""

    loss_sum: Tensor
    """The loss summed over the global batch."""
    grad_norm: Tensor
    """L2 norm of the gradient of the mean loss, before clipping."""
    skipped: Tensor
    """1.0 where loss or norm was not finite and the weights were left as they were, else 0.0."""


class Engine:
    """One process's view of all processes of the run."""

    plan: BatchPlan
    """How each step is cut into micro-batches; set by whoever trains, before ``prepare``."""

    def __init__(self, config: Config) -> None:
        from accelerate import Accelerator

        from train.strategies.registry import accelerate_options, strategy_name

        if config.deterministic:
            make_deterministic()
        on_gpu = torch.cuda.is_available()
        if config.precision == "fp16" and not on_gpu:
            raise UsageError(
                "precision is 'fp16', which needs a GPU, and there is none here; use bf16 or fp32."
            )
        self.config = config
        self.world = this_world()
        self.strategy_name = strategy_name(config, self.world)
        timeout = timeout_of(config.watchdog.first_timeout, config.watchdog.timeout)
        if self.strategy_name != "single" and not dist.is_initialized():
            start_group(self.world, "cuda:nccl,cpu:gloo" if on_gpu else "gloo", timeout)
        _ignore_launcher_s_plugins()
        # Without cpu=True Accelerate would leave two CPU processes strangers to each other.
        self.accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision=_PRECISION[config.precision],
            step_scheduler_with_optimizer=False,
            kwargs_handlers=accelerate_options(config, self.world),
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        self._check_world()
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        # Decisions travel by gloo on the host, so that they never wait for the device; writing
        # checkpoints has a group of its own because it runs in another thread.
        self.host_group = self.checkpoint_group = None
        if self.world_size > 1:
            self.host_group = dist.new_group(backend="gloo", timeout=timeout)
            self.checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)
            # To write may take a rank much longer than the watchdog lets a step.
            dist.distributed_c10d._set_pg_timeout(max(timeout, _TO_WRITE), self.checkpoint_group)

    def _check_world(self) -> None:
        asked = self.world.world_size
        if asked != self.world_size:
            raise RetryError(
                f"WORLD_SIZE is {asked} in the environment, but the engine found "
                f"{self.world_size} process(es); start the run with torchrun or accelerate launch."
            )

    # -- the model ---------------------------------------------------------------------------

    def prepare(
        self,
        model: nn.Module,
        build: Callable[[nn.Module], Optimizer],
        blocks: Sequence[nn.Module] = (),
        initial: Initial | None = None,
    ) -> None:
        """Spreads the model, the same on every rank, over the ranks. ``build`` makes the
        optimiser of a model's parameters; ``blocks`` are modules to be gathered one at a time;
        ``initial`` draws the values of a model that is on the meta device."""
        from train.strategies.blocks import checkpoint_activations, find_blocks
        from train.strategies.registry import find_strategy

        found = find_blocks(model, list(blocks), self.config.fsdp2.blocks)
        if self.config.activation_checkpointing:
            if not found:
                raise UsageError(
                    "activation_checkpointing is true, but the model has no blocks: no module "
                    "list, none named by the task's blocks(model), none by fsdp2.blocks; name "
                    "them, or set it to false."
                )
            checkpoint_activations(found)
        strategy = find_strategy(self.strategy_name)
        self.strategy: Strategy = strategy(self, self.config, found)
        if initial and not strategy.cuts_parameters:
            initial.fill(model, torch.device("cpu"))
        self.strategy.initial = initial
        self.strategy.prepare(model, build)

    def forget(self) -> None:
        """Undoes ``prepare``, and lets go of the memory."""
        self.__dict__.pop("strategy", None)
        self.accelerator.free_memory()

    def prepare_evaluation(self, model: nn.Module) -> None:
        """Takes a model that is not to be trained; each rank has all of it."""
        from train.strategies.ddp import SingleStrategy

        strategy = SingleStrategy(self, self.config, [])
        strategy.prepare(model, None)
        self.strategy = strategy

    def on_device(self, model: nn.Module, *, move: bool = True) -> nn.Module:
        """The model on this rank's device (unless it is to stay where it is), with a forward pass
        in the run's precision."""
        moved: nn.Module = self.accelerator.prepare_model(
            model, device_placement=move, evaluation_mode=True
        )
        return moved

    @property
    def model(self) -> nn.Module:
        """What a task's loss calls."""
        return self.strategy.model

    @property
    def bare_model(self) -> nn.Module:
        """The model without wrappers: its parameters bear their own names."""
        return self.strategy.bare_model

    @property
    def optimizer(self) -> Optimizer:
        """Whose ``param_groups`` hold the learning rate."""
        return self.strategy.optimizer

    def to_device(self, batch: T) -> T:
        """The batch with its tensors on this rank's device; does not wait for the copy."""
        if self.device.type == "cpu":
            return batch
        from accelerate.utils import send_to_device

        moved: T = send_to_device(batch, self.device, non_blocking=True)
        return moved

    def backward(self, loss_sum: Tensor, total_count: int) -> None:
        """Adds this micro-batch's part of the gradient of (global loss sum / global count).

        Strategies average gradients over ranks, hence the factor.
        """
        # No unit in the whole batch: NaN, which makes all ranks skip the step.
        factor = self.world_size / total_count if total_count else float("nan")
        if self.loss_scale:
            factor *= self.loss_scale.value
        self.strategy.backward(loss_sum * factor)

    def step(self, pending_loss: Callable[[], Tensor], clip_norm: float | None) -> StepResult:
        """Clips the gradients and lets the optimiser step, unless something is not finite.

        ``pending_loss`` is what ``begin_sum`` of the loss gave. All ranks skip or none does: both
        numbers are global.
        """
        loss_sum = pending_loss()
        norm, skipped = self.strategy.update(loss_sum, clip_norm)
        if self.loss_scale:
            self.loss_scale.update(skipped=bool(skipped.item()))
        return StepResult(loss_sum, norm, skipped)

    # -- what ranks share --------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on the device; the argument may be overwritten."""
        return self.begin_sum(tensor)()

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts ``sum`` and goes on; what is returned waits for it and gives the result."""
        if self.world_size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Sums over all ranks, on the host and exact modulo 2**64 (as signed 64-bit)."""
        return self.begin_sum_ints(values)()

    def begin_sum_ints(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Starts ``sum_ints`` and goes on; what is returned waits for it and gives the result."""
        if self.world_size == 1:
            return lambda: list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, group=self.host_group, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return wait

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. It is pickled: small things only."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of ranks. They are pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, on every rank; as many from each."""
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.host_group)
        return [numbers.tolist() for numbers in everyone]

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Overwrites a tensor on the device with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def close(self) -> None:
        """Takes the process groups down, which lets the process end cleanly."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _ignore_launcher_s_plugins() -> None:
    """``accelerate launch`` asks by environment for plugins of Accelerate, which would wrap the
    model a second time; what they stand for is in the strategy by now."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
