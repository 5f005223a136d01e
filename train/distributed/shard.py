"""What one rank holds of a tensor that may be spread over many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""A rectangular part of a tensor: where it begins in each dimension, and its size in each."""


@dataclass(frozen=True)
class Shard:
    """One rank's share of a tensor of ``shape``, as memory of its own.

    Three cases: the whole tensor; a box of it (FSDP2 cuts along a dimension); or a range of its
    elements in row-major order (ZeRO cuts a flat buffer wherever it comes to a rank's end).
    """

    shape: torch.Size
    """Of the whole tensor."""
    local: Tensor
    """This rank's elements: shaped like the box, or flat for a range. May be empty."""
    offsets: tuple[int, ...] = ()
    """Where the box begins."""
    start: int | None = None
    """Where the range begins in the flattened tensor; None for a box."""

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """The share that a tensor stands for: all of a plain one, this rank's of a DTensor."""
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
        """Of the elements."""
        return self.local.dtype

    @property
    def is_full(self) -> bool:
        """Whether this rank holds all of the tensor."""
        return self.start is None and self.local.shape == self.shape

    def with_local(self, local: Tensor) -> Shard:
        """The same share in other memory."""
        return replace(self, local=local)

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """The share as boxes, each with a view of its memory; nothing where it is empty."""
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
    """Cuts elements ``start`` to ``stop`` of a tensor in row-major order into boxes, in order.

    At most 2 * dimensions - 1 of them: part of a first row, whole rows, part of a last row.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        return _within(last, shape, start, stop)
    boxes = _within(first - 1, shape, start, first * row)
    if first < last:
        boxes.append(((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + _within(last, shape, last * row, stop)


def _within(index: int, shape: tuple[int, ...], start: int, stop: int) -> list[Chunk]:
    """The boxes of a range that lies within one row."""
    row = math.prod(shape[1:])
    inner = chunks_of_range(shape[1:], start - index * row, stop - index * row)
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in inner]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers; tensors with several names only once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def parameter_names(model: nn.Module) -> dict[int, str]:
    """``id(parameter)`` to the parameter's fully qualified name; of shared ones the first."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
