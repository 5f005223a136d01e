"""One rank's shard of a tensor, and the named tensors of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

EXTRA_STATE = "_extra_state"
"""The last part of the name that a state_dict gives to what ``get_extra_state`` returns."""

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""A rectangular part of a tensor, as in DCP: its offset and its size in each dimension."""


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one rank holds.

    One of three: the full tensor; a chunk of it (FSDP2 shards along a dimension); or a range of
    its elements in row-major order (ZeRO partitions a flat buffer).
    """

    shape: torch.Size
    """Shape of the full tensor."""
    local: Tensor
    """This rank's elements: of the chunk's shape, or 1-D for a range. May be empty."""
    offsets: tuple[int, ...] = ()
    """The chunk's offset in each dimension."""
    start: int | None = None
    """The range's first element in the flattened tensor; None for a chunk."""

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """The shard of a tensor, sharing its memory: all of a plain one, the local part of a
        DTensor."""
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape, tensor, (0,) * tensor.dim())
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return cls(tensor.shape, tensor.to_local(), tuple(offsets))

    @property
    def dtype(self) -> torch.dtype:
        """The elements' dtype."""
        return self.local.dtype

    @property
    def is_full(self) -> bool:
        """Whether this rank holds the full tensor."""
        return self.start is None and self.local.shape == self.shape

    def with_local(self, local: Tensor) -> Shard:
        """The same shard with other memory."""
        return replace(self, local=local)

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """The shard as chunks, each with a view of its memory; none if the shard is empty."""
        if self.start is None:
            if self.local.numel() or not math.prod(self.shape):
                yield (self.offsets, tuple(self.local.shape)), self.local
            return
        done = 0
        for offsets, sizes in chunks_of_range(
            tuple(self.shape), self.start, self.start + self.local.numel()
        ):
            size = math.prod(sizes)
            yield (offsets, sizes), self.local[done : done + size].view(sizes)
            done += size


def chunks_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Chunk]:
    """Splits elements ``start`` to ``stop`` (row-major order) of a tensor into chunks, in order.

    At most 2 * dimensions - 1 chunks: part of a first row, full rows, part of a last row.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the full rows
    if first > last:  # within one row
        return _within(last, shape, start, stop)
    chunks = _within(first - 1, shape, start, first * row)
    if first < last:
        chunks.append(((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return chunks + _within(last, shape, last * row, stop)


def _within(index: int, shape: tuple[int, ...], start: int, stop: int) -> list[Chunk]:
    """The chunks of a range within one row."""
    row = math.prod(shape[1:])
    inner = chunks_of_range(shape[1:], start - index * row, stop - index * row)
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in inner]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by fully qualified name, as the modules hold them; a shared
    tensor has its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_extra_state(name):
            continue
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def names_of_tensors(model: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor of ``model_tensors``, by the first: a shared tensor has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not is_extra_state(name):
            names.setdefault(id(tensor), []).append(name)
    return {found[0]: found for found in names.values()}


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state_dict is the extra state of a module, or a tensor of it."""
    return EXTRA_STATE in name.split(".")


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Fully qualified names by ``id(parameter)``; a shared parameter has its first name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
