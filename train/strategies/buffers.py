"""Persistent buffers that all ranks have alike, and that a step can restore."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.distributed.collectives import Collectives


class BufferSync:
    """Copies the persistent buffers of rank 0 to all ranks, one exchange per dtype."""

    def __init__(self, model: nn.Module, collectives: Collectives) -> None:
        self._collectives = collectives
        persistent = model.state_dict(keep_vars=True)
        self._by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name, buffer in model.named_buffers():
            if name in persistent:
                self._by_dtype.setdefault(buffer.dtype, []).append(buffer.detach())
        self._synced: list[tuple[Tensor, list[Tensor]]] = []

    def sync(self) -> None:
        """Gives all ranks the buffers of rank 0; collective."""
        self._synced = []
        for buffers in self._by_dtype.values():
            joined = torch.cat([buffer.flatten() for buffer in buffers])
            self._synced.append((joined, buffers))
            if self._collectives.world_size > 1:
                self._collectives.broadcast(joined)
                _split_into(buffers, joined)

    def restore(self) -> None:
        """Gives the buffers the values that they had after the last ``sync``."""
        for joined, buffers in self._synced:
            _split_into(buffers, joined)


def _split_into(tensors: list[Tensor], joined: Tensor) -> None:
    """Overwrites ``tensors`` with the parts of ``joined``, the concatenation of such tensors."""
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
