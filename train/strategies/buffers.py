"""Persistent buffers and extra state that all ranks have alike, and that a step can restore."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.checkpoint.extra_state import (
    ExtraState,
    clone,
    get_extra_state,
    has_extra_state,
    same,
    set_extra_state,
)
from train.distributed.collectives import Collectives


class SharedBuffers:
    """The buffers that several modules of a model have in common, when this is made.

    ``nn.Module.to`` keeps parameters shared, but gives each module a buffer of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, name))
        self._groups = [group for group in places.values() if len(group) > 1]

    def share(self) -> None:
        """Gives the modules the buffer of the first of them again."""
        for (first, key), *others in self._groups:
            for module, name in others:
                module._buffers[name] = first._buffers[key]


class _Buffer(NamedTuple):
    """A buffer as it was at the last ``sync``."""

    module: nn.Module
    name: str
    tensor: Tensor


class BufferSync:
    """Copies the persistent buffers of rank 0 to all ranks, one exchange per dtype, and what
    modules return from ``get_extra_state``, in one more exchange where there are such modules.

    A forward pass may assign other tensors to the buffers (``self.mean = ...``), so the tensors
    are looked up each time.
    """

    def __init__(self, model: nn.Module, collectives: Collectives) -> None:
        self._collectives, self._model = collectives, model
        self._has_extra_state = any(map(has_extra_state, model.modules()))
        self._extra_state: ExtraState | None = None
        self._places = [
            (module, name)
            for module in model.modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        ]
        self._synced: list[tuple[Tensor, list[_Buffer]]] = []
        self._unset: list[tuple[nn.Module, str]] = []

    def sync(self) -> None:
        """Gives all ranks the buffers of rank 0; collective."""
        by_dtype: dict[torch.dtype, list[_Buffer]] = {}
        seen = set()
        for module, name in self._places:
            tensor = module._buffers[name]
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                by_dtype.setdefault(tensor.dtype, []).append(_Buffer(module, name, tensor))
        self._unset = [place for place in self._places if place[0]._buffers[place[1]] is None]
        self._synced = []
        for buffers in by_dtype.values():
            joined = torch.cat([buffer.tensor.detach().flatten() for buffer in buffers])
            self._synced.append((joined, buffers))
            if self._collectives.world_size > 1:
                # As bytes: gloo and NCCL do not know all dtypes (uint16, float8).
                self._collectives.broadcast(joined.view(torch.uint8))
                _split_into(buffers, joined)

        if self._has_extra_state:
            self._extra_state = self._sync_extra_state()

    def _sync_extra_state(self) -> ExtraState:
        own = clone(get_extra_state(self._model))
        if self._collectives.world_size == 1:
            return own
        on_host = ExtraState(own.values, {name: t.cpu() for name, t in own.tensors.items()})
        shared = self._collectives.broadcast_pickled(on_host)
        if not same(on_host, shared):
            set_extra_state(self._model, shared)
        return shared

    def restore(self) -> None:
        """Gives the buffers and modules the values that they had after the last ``sync``."""
        if self._extra_state is not None:
            set_extra_state(self._model, self._extra_state)
        for module, name in self._unset:
            module._buffers[name] = None
        for joined, buffers in self._synced:
            _split_into(buffers, joined)
            for module, name, tensor in buffers:
                module._buffers[name] = tensor


def _split_into(buffers: list[_Buffer], joined: Tensor) -> None:
    """Overwrites the tensors with the parts of ``joined``, the concatenation of such tensors."""
    parts = torch.split(joined, [buffer.tensor.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.tensor.detach().copy_(part.view_as(buffer.tensor))
