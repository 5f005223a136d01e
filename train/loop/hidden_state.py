"""State of modules that a forward pass changes, and that is neither synchronised nor saved."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.checkpoint.extra_state import has_extra_state

_OF_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_OF_LIBRARIES = ("ds_", "_ds_", "applied_pre_backward", "_external_params", "_fsdp", "_hf_")
"""Names, or their beginnings, of what DeepSpeed, FSDP2 and Accelerate add to modules."""
_MOST_ITEMS, _MOST_BYTES, _DEPTH = 1000, 2**20, 3


class HiddenState:
    """The plain attributes and non-persistent buffers of a model, as they are when it is made.

    Looks at numbers, text, tensors, arrays and random generators, and lists and dicts of these;
    not into other objects. Does not wait for the device unless a tensor was replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {name: _state(value, _DEPTH) for name, value in _attributes(model)}

    def changed(self) -> list[str]:
        """The names of what has another value now, or is new."""
        return [
            name
            for name, value in _attributes(self._model)
            if not _same(self._before.get(name), _state(value, _DEPTH))
        ]


class TensorState:
    """A tensor and the number of its in-place changes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = None if tensor.is_inference() else tensor._version

    def same(self, other: TensorState) -> bool:
        """Whether the values are the same; waits for the device where a tensor was replaced."""
        if self.tensor is other.tensor:
            return self.version == other.version
        one, two = self.tensor.detach(), other.tensor.detach()
        alike = one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
        return alike and not one.is_meta and torch.equal(one, two)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of all modules without extra state, by their qualified name."""
    for path, module in model.named_modules():
        if has_extra_state(module):
            continue
        plain = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_MODULE and not name.startswith(_OF_LIBRARIES)
        }
        private = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        for name, value in {**plain, **private}.items():
            yield f"{path}.{name}" if path else name, value


def _state(value: Any, depth: int) -> Any:
    """What can be compared of a value; None for what is not looked at."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, deque)):
        looked_at = depth and len(value) <= _MOST_ITEMS
        return [_state(item, depth - 1) for item in value] if looked_at else None
    if isinstance(value, Tensor):
        return None if isinstance(value, (nn.Parameter, DTensor)) else TensorState(value)
    if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
        return _generator_state(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tobytes() if value.nbytes <= _MOST_BYTES and value.dtype.kind != "O" else None
    if isinstance(value, float):
        return repr(value)  # NaN is equal to itself
    return value if isinstance(value, (bool, int, str, bytes)) else None


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return str(value.bit_generator.state) if hasattr(value, "bit_generator") else value.getstate()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, TensorState) and isinstance(other, TensorState):
        return one.same(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
