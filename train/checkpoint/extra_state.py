"""The state that modules return from ``get_extra_state``, besides parameters and buffers.

It may be any object in PyTorch. Here it is data only, since loading a checkpoint must not run
code: numbers, text, bytes, tensors and numpy arrays, and lists, tuples and dicts of these. It is
stored as a JSON value, and its tensors beside those of the model.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.distributed.shard import EXTRA_STATE
from train.exits import UsageError, first_line
from train.json_files import is_too_deep

_SEQUENCES = {"list": list, "tuple": tuple}
_MAPPINGS = {"dict": dict, "ordered": OrderedDict}
_KIND_OF: dict[type, str] = {kind: name for name, kind in (_SEQUENCES | _MAPPINGS).items()}


class ExtraState(NamedTuple):
    """The extra state of all modules of a model."""

    values: dict[str, Any]
    """JSON values by ``<module>._extra_state``, with references to the tensors."""
    tensors: dict[str, Tensor]
    """Tensors by ``<module>._extra_state.<number>``."""


class _NotDataError(Exception):
    """A value is not data; the text says what it is."""


def has_extra_state(module: nn.Module) -> bool:
    """Whether the module's class defines ``get_extra_state``."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def get_extra_state(model: nn.Module) -> ExtraState:
    """The extra state of all modules of a model; its tensors share the modules' memory.

    Raises UsageError for a state that is not data.
    """
    state = ExtraState({}, {})
    for key, module in _modules(model).items():
        try:
            state.values[key] = _encode(module.get_extra_state(), key, state.tensors)
            if is_too_deep(state.values[key]):
                raise RecursionError
        except (_NotDataError, RecursionError) as error:
            what = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise UsageError(
                f"get_extra_state() of the {type(module).__name__} {_shown(key)} returned a value "
                f"that is {what}; return numbers, text, bytes, tensors, and lists, tuples and "
                "dicts of these, since a checkpoint holds data only."
            ) from None
    return state


def set_extra_state(model: nn.Module, state: ExtraState) -> None:
    """Passes to each module its state. Tensors that were not on the CPU are moved to the device of
    the model's parameters. Raises UsageError where a module refuses its state."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for key, module in _modules(model).items():
        if key not in state.values:
            continue
        try:
            module.set_extra_state(_decode(state.values[key], state.tensors, device))
        except Exception as error:
            raise UsageError(
                f"set_extra_state() of the {type(module).__name__} {_shown(key)} failed for what "
                f"get_extra_state() returned ({type(error).__name__}: {first_line(error)}); make "
                "it restore that state."
            ) from error


def check_extra_state(model: nn.Module) -> None:
    """Raises UsageError for a module whose extra state cannot be stored and restored."""
    for key, module in _modules(model).items():
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise UsageError(
                f"The {type(module).__name__} {_shown(key)} has get_extra_state() but no "
                "set_extra_state(), so that its state would be lost on resume; implement both."
            )
    before = clone(get_extra_state(model))
    set_extra_state(model, before)
    after = get_extra_state(model)
    if not same(before, after):
        differ = [key for key in before.values if before.values[key] != after.values.get(key)]
        key = next(iter(differ), next(iter(before.values)))
        raise UsageError(
            f"set_extra_state() does not restore what get_extra_state() returned, for the module "
            f"{_shown(key)}; make it restore that state."
        )


def clone(state: ExtraState) -> ExtraState:
    """The same state with memory of its own."""
    return ExtraState(state.values, {name: t.clone() for name, t in state.tensors.items()})


def same(one: ExtraState, other: ExtraState) -> bool:
    """Whether two states are equal."""
    return (
        one.values == other.values
        and one.tensors.keys() == other.tensors.keys()
        and all(_same_tensor(t, other.tensors[name]) for name, t in one.tensors.items())
    )


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have extra state, by the name that a state_dict gives to it."""
    return {
        f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE: module
        for name, module in model.named_modules()
        if has_extra_state(module)
    }


def _shown(key: str) -> str:
    name = key.removesuffix(EXTRA_STATE).removesuffix(".")
    return repr(name) if name else "(the model itself)"


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors are added to ``tensors``."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}  # JSON has no infinity and no NaN
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode(), "mutable": isinstance(value, bytearray)}
    if kind := _KIND_OF.get(type(value)):
        parts = value
        if kind in _MAPPINGS:
            parts = [part for item in value.items() for part in item]
        return {kind: [_encode(part, key, tensors) for part in parts]}
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value, key, tensors)
    if isinstance(value, Tensor):
        return {"tensor": _add(value, key, tensors), "on": value.device.type}
    raise _NotDataError(f"or contains a {type(value).__module__}.{type(value).__qualname__}")


def _encode_array(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if value.dtype.kind not in "biufc":
        raise _NotDataError(f"or contains a numpy array of dtype {value.dtype}")
    array = np.array(value)
    name = _add(torch.from_numpy(array.reshape(-1)), key, tensors)
    return {"array": name, "shape": list(array.shape), "scalar": isinstance(value, np.generic)}


def _add(tensor: Tensor, key: str, tensors: dict[str, Tensor]) -> str:
    if isinstance(tensor, DTensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise _NotDataError("or contains a tensor that is sharded, sparse or quantized")
    if tensor.is_meta:
        raise _NotDataError("or contains a tensor on the meta device, which has no values")
    name = f"{key}.{len(tensors)}"
    tensors[name] = tensor.detach()
    return name


def _decode(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value of a JSON value of ``_encode``, with tensors of its own memory."""
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    if "bytes" in value:
        data = base64.b64decode(value["bytes"])
        return bytearray(data) if value["mutable"] else data
    if "tensor" in value or "array" in value:
        return _decode_tensor(value, tensors, device)
    ((kind, items),) = value.items()
    parts = [_decode(item, tensors, device) for item in items]
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](zip(parts[::2], parts[1::2], strict=True))
    return _SEQUENCES[kind](parts)


def _decode_tensor(
    value: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> Any:
    if "tensor" in value:
        tensor = tensors[value["tensor"]].clone()
        return tensor.to(device) if value["on"] != "cpu" else tensor.cpu()
    array = tensors[value["array"]].cpu().numpy().reshape(value["shape"]).copy()
    return array[()] if value["scalar"] else array
