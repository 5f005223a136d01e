"""What the ranks of a process group exchange: sums, broadcasts and gathers, in one place.

Each method is collective: all ranks of the group call it, in the same order. With one rank each
returns its argument at once, so that callers read as if there were one process.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed.plain_data import decode, encode
from train.signing import Signer

T = TypeVar("T")


class Collectives:
    """The exchanges of ``world_size`` ranks, of which this is ``rank``.

    Tensors on the device go through the default process group; decisions and small values on
    the host go through ``host_group`` (gloo), so that they never wait for the device. ``signer``
    signs what is pickled.
    """

    def __init__(
        self, rank: int, world_size: int, host_group: Any = None, signer: Signer | None = None
    ) -> None:
        self.rank, self.world_size, self.host_group = rank, world_size, host_group
        self._signer = signer or Signer()

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
        """Rank 0's value on every rank: plain data (``train.distributed.plain_data``), for small
        values only. Raises TypeError for anything else."""
        if self.world_size == 1:
            return value
        return cast("T", decode(self._broadcast_bytes(encode(value) if self.rank == 0 else b"")))

    def all_gather_object(self, value: T) -> list[T]:
        """The value of each rank on every rank, ordered by rank: plain data, for small values only.
        Raises TypeError for anything else."""
        if self.world_size == 1:
            return [value]
        return [decode(data) for data in self._all_gather_bytes(encode(value))]

    def broadcast_pickled(self, value: T) -> T:
        """As ``broadcast_object``, for values that are not plain data. They are pickled and
        signed: a pickle can run code on the rank that reads it."""
        if self.world_size == 1:
            return value
        data = self._signed_pickle(value) if self.rank == 0 else b""
        return cast("T", self._unpickle(0, self._broadcast_bytes(data)))

    def all_gather_pickled(self, value: T) -> list[T]:
        """As ``all_gather_object``, for values that are not plain data; see above."""
        if self.world_size == 1:
            return [value]
        gathered = self._all_gather_bytes(self._signed_pickle(value))
        return [self._unpickle(rank, data) for rank, data in enumerate(gathered)]

    def _signed_pickle(self, value: Any) -> bytes:
        return self._signer.sign(f"pickle/{self.rank}", pickle.dumps(value))

    def _unpickle(self, rank: int, signed: bytes) -> Any:
        return pickle.loads(self._signer.check(f"pickle/{rank}", signed))

    def _broadcast_bytes(self, own: bytes) -> bytes:
        [size] = self._broadcast_on_host(torch.tensor([len(own)])).tolist()
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        return self._broadcast_on_host(buffer).numpy().tobytes()

    def _broadcast_on_host(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, src=0, group=self.host_group)
        return tensor

    def _all_gather_bytes(self, own: bytes) -> list[bytes]:
        sizes = self._all_gather_on_host(torch.tensor([len(own)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        gathered = self._all_gather_on_host(padded)
        return [
            data[: int(size)].numpy().tobytes() for data, size in zip(gathered, sizes, strict=True)
        ]

    def _all_gather_on_host(self, mine: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self.host_group)
        return gathered

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers (float64) of each rank on every rank, ordered by rank; each rank passes
        equally many."""
        if self.world_size == 1:
            return [list(values)]
        gathered = self._all_gather_on_host(torch.tensor(values, dtype=torch.float64))
        return [numbers.tolist() for numbers in gathered]
