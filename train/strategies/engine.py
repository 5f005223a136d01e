"""The engine of one process: its device, its process groups, and mixed precision.

Accelerate starts the device, runs mixed precision and wraps the model for DDP. Its data loading,
scheduler, accumulation, clipping and checkpointing are not used, because they make the result
depend on the placement. How a model is sharded is the strategy's part (:mod:`train.strategies`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from train.distributed.collectives import Collectives
from train.distributed.gpu import check_own_gpus, use_gpu
from train.distributed.process_group import end_groups, start_group
from train.distributed.randomness import make_deterministic
from train.distributed.world import World
from train.exits import RetryError, UsageError
from train.output import log
from train.process.cores import threads_per_process
from train.signing import Signer

T = TypeVar("T")
_CHECKPOINT_TIMEOUT = timedelta(hours=1)
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine:
    """One process of a run.

    ``distributed`` says whether the ranks need a process group (also for one rank, where the
    strategy asks for it), ``timeout`` how long an exchange may take, and ``kwargs_handlers`` what
    Accelerate must know of the strategy. ``joining`` surrounds the wait for the other ranks.
    Raises UsageError for a precision that the device cannot compute in and for ranks that have the
    same GPU, and RetryError where the launcher's world is not the one that was found.
    """

    def __init__(
        self,
        world: World,
        *,
        precision: str,
        deterministic: bool,
        distributed: bool,
        timeout: timedelta,
        kwargs_handlers: Sequence[Any] = (),
        joining: AbstractContextManager[object] | None = None,
    ) -> None:
        from accelerate import Accelerator

        if deterministic:
            make_deterministic()
        on_gpu = torch.cuda.is_available()
        if precision == "fp16" and not on_gpu:
            raise UsageError(
                "precision is 'fp16', which needs a GPU, but this machine has none; use bf16 or "
                "fp32."
            )
        # In evaluations it bypasses the modules for which sharded strategies gather parameters, and
        # returns other values where a mask pads.
        torch.backends.mha.set_fastpath_enabled(False)
        self.world = world
        if on_gpu:
            use_gpu(world, os.environ, distributed=distributed)
        if distributed and not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
            with joining or nullcontext():
                start_group(world, backend, timeout, report=log)
            # Accelerate and DeepSpeed look for a process group only where a launcher set this.
            os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        _ignore_plugins_of_accelerate_launch()
        # Without cpu=True, Accelerate runs two CPU processes as two independent ones.
        with warnings.catch_warnings():  # it chooses the number of threads and warns about it
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            self.accelerator = Accelerator(
                cpu=not on_gpu,
                mixed_precision=_MIXED_PRECISION[precision],
                step_scheduler_with_optimizer=False,
                kwargs_handlers=list(kwargs_handlers),
            )
        if not os.environ.get("OMP_NUM_THREADS", "").strip():
            # By default torch has a thread for each core, also in a container with a lower limit.
            most = threads_per_process(1)
            if torch.get_num_threads() > most:
                torch.set_num_threads(most)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        if world.world_size != self.world_size:
            raise RetryError(
                f"WORLD_SIZE is {world.world_size} in the environment, but Accelerate found "
                f"{self.world_size} process(es); start the run with torchrun or accelerate launch."
            )
        host_group = checkpoint_group = None
        if self.world_size > 1:
            host_group = dist.new_group(backend="gloo", timeout=timeout)
            # Checkpoints are written in another thread, which needs a group of its own, and a
            # rank may take much longer to write one than to take a step.
            checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)
            dist.distributed_c10d._set_pg_timeout(
                max(timeout, _CHECKPOINT_TIMEOUT), checkpoint_group
            )
        signer = Signer.of_environment() if self.world_size > 1 else Signer()
        self.collectives = Collectives(self.rank, self.world_size, host_group, signer)
        self.checkpoint_collectives = Collectives(
            self.rank, self.world_size, checkpoint_group, signer
        )
        check_own_gpus(self.collectives, world, self.device)

    def on_device(self, model: nn.Module, *, move: bool = True) -> nn.Module:
        """The model, moved to this rank's device where ``move`` is true, with a forward pass in
        the run's precision."""
        moved: nn.Module = self.accelerator.prepare_model(
            model, device_placement=move, evaluation_mode=True
        )
        return moved

    def autocast(self) -> AbstractContextManager[Any]:
        """Surrounds what is computed in the run's precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def to_device(self, batch: T) -> T:
        """The batch with its tensors on this rank's device. Does not wait for the copy."""
        if self.device.type == "cpu":
            return batch
        from accelerate.utils import send_to_device

        moved: T = send_to_device(batch, self.device, non_blocking=True)
        return moved

    def free_memory(self) -> None:
        """Drops Accelerate's references to models, so that their memory can be freed."""
        self.accelerator.free_memory()

    def leave(self, error: type[BaseException] | None, *_: object) -> None:
        """An exit for an ``ExitStack``: ends the process groups, so that the process can end
        cleanly. After an error, other ranks may not take part any more."""
        end_groups(failed=error is not None)


def _ignore_plugins_of_accelerate_launch() -> None:
    """``accelerate launch`` asks for plugins of Accelerate by environment variables. They would
    wrap the model a second time; the strategy was chosen from them already."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
