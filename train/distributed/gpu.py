"""The GPU of each rank: which index it has in this process, and whether no other rank uses it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import ParamSpec, TypeVar

import torch

from train.distributed.collectives import Collectives
from train.distributed.world import World
from train.exits import UsageError

P = ParamSpec("P")
T = TypeVar("T")


def gpu_index(world: World, visible: int) -> int:
    """The index of this rank's GPU among the ``visible`` ones of its process.

    A launcher shows all GPUs of the host to each rank, or only its own to each (Slurm's
    ``--gpus-per-task``), which then have the first indices. :func:`check_own_gpus` finds ranks that
    get the same one.
    """
    # Without a local rank: ranks are usually numbered host by host.
    number = world.rank if world.local_rank_guessed else world.local_rank
    return number % visible


def use_gpu(world: World, environ: MutableMapping[str, str], *, distributed: bool) -> None:
    """Makes this rank's GPU the current device; a process without a launcher keeps its own.

    Accelerate (for DDP) and DeepSpeed use LOCAL_RANK as the index of the device, so it is set to
    that index. A process without process group that has no LOCAL_RANK gets none.
    """
    if world.world_size == 1 and "LOCAL_RANK" not in environ:
        index = torch.cuda.current_device()
    else:
        index = gpu_index(world, torch.cuda.device_count())
        torch.cuda.set_device(index)
    if distributed or "LOCAL_RANK" in environ:
        environ["LOCAL_RANK"] = str(index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:  # DeepSpeed asserts that they are equal
            environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def shared_gpu(devices: list[str]) -> tuple[list[int], str] | None:
    """The ranks that have one device, and its identifier, from the identifier of each rank; None
    where each rank has a device of its own."""
    by_device: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        by_device.setdefault(device, []).append(rank)
    return next(((ranks, device) for device, ranks in by_device.items() if len(ranks) > 1), None)


def check_own_gpus(collectives: Collectives, world: World, device: torch.device) -> None:
    """Raises UsageError on all ranks where two of them have the same GPU, which NCCL refuses;
    collective."""
    if device.type != "cuda":
        return
    own = str(torch.cuda.get_device_properties(device).uuid)
    found = shared_gpu(collectives.all_gather_object(own))
    if found:
        ranks, uuid = found
        guessed = any(collectives.all_reduce_ints([world.local_rank_guessed]))
        where = ", because LOCAL_RANK is not set" if guessed else ""
        raise UsageError(
            f"Ranks {', '.join(map(str, ranks))} have the same GPU ({uuid}){where}; start at most "
            "one rank per GPU, and let the launcher set LOCAL_RANK, from 0 on each host."
        )


def with_current_gpu(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` for a new thread, where the current device is that of the calling thread. CUDA's
    current device belongs to the thread, and is device 0 in a new one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return function
    device = torch.cuda.current_device()

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        torch.cuda.set_device(device)
        return function(*args, **kwargs)

    return call
