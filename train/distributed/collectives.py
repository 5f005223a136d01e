"""What the ranks of a process group exchange: sums, broadcasts and gathers, in one place.

Each method is collective: all ranks of the group call it, in the same order. With one rank each
returns its argument at once, so that callers read as if there were one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Collectives:
    """The exchanges of ``world_size`` ranks, of which this is ``rank``.

    Tensors on the device go through the default process group; decisions and small values on
    the host go through ``host_group`` (gloo), so that they never wait for the device.
    """

    def __init__(self, rank: int, world_size: int, host_group: Any = None) -> None:
        self.rank, self.world_size, self.host_group = rank, world_size, host_group

    # -- tensors on the device ---------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks. May overwrite ``tensor``."""
        return self.start_all_reduce(tensor)()

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts ``all_reduce`` without waiting; call the result to wait and get the sum."""
        if self.world_size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites ``tensor`` with that of rank 0."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    # -- values on the host ------------------------------------------------------------------

    def all_reduce_ints(self, values: Sequence[int]) -> list[int]:
        """Sums over all ranks, one per position; exact modulo 2**64, as signed 64-bit integers."""
        return self.start_all_reduce_ints(values)()

    def start_all_reduce_ints(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Starts ``all_reduce_ints`` without waiting; call the result to wait and get the sums."""
        if self.world_size == 1:
            return lambda: list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, group=self.host_group, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return wait

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.all_reduce_ints([0])

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank. It is pickled: for small values only."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The value of each rank on every rank, ordered by rank. They are pickled: for small
        values only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers (float64) of each rank on every rank, ordered by rank; each rank passes
        equally many."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self.host_group)
        return [numbers.tolist() for numbers in gathered]
