"""Settings of torch on which a result may depend: to notice changes, and to undo them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _attribute(owner: Any, name: str) -> _Setting:
    return _Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _deterministic() -> tuple[bool, bool]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, torch.is_deterministic_algorithms_warn_only_enabled()


def _cuda_device() -> int | None:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if in_use else None


def _set_default_device(device: torch.device) -> None:
    # None, not the CPU: torch would pass each call of a function that makes tensors to a handler.
    torch.set_default_device(None if device.type == "cpu" else device)


_matmul: Any = torch.backends.cuda.matmul
_cudnn: Any = torch.backends.cudnn
_mkldnn: Any = torch.backends.mkldnn
# Those that write several others come before these.
_SETTINGS = {
    "gradient mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": _Setting(torch.get_default_device, _set_default_device),
    "current CUDA device": _Setting(
        _cuda_device, lambda device: None if device is None else torch.cuda.set_device(device)
    ),
    "number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": _Setting(
        _deterministic,
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "mha.fastpath": _Setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled
    ),
    "cudnn.benchmark": _attribute(_cudnn, "benchmark"),
    "cudnn.deterministic": _attribute(_cudnn, "deterministic"),
    "cudnn.allow_tf32": _attribute(_cudnn, "allow_tf32"),
    "float32 matmul precision": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "fp32_precision": _attribute(torch.backends, "fp32_precision"),
    "cuda.matmul.fp32_precision": _attribute(_matmul, "fp32_precision"),
    "cudnn.conv.fp32_precision": _attribute(_cudnn.conv, "fp32_precision"),
    "cudnn.rnn.fp32_precision": _attribute(_cudnn.rnn, "fp32_precision"),
    "mkldnn.matmul.fp32_precision": _attribute(_mkldnn.matmul, "fp32_precision"),
    "mkldnn.conv.fp32_precision": _attribute(_mkldnn.conv, "fp32_precision"),
    "mkldnn.rnn.fp32_precision": _attribute(_mkldnn.rnn, "fp32_precision"),
    "allow_fp16_reduced_precision_reduction": _attribute(
        _matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "allow_bf16_reduced_precision_reduction": _attribute(
        _matmul, "allow_bf16_reduced_precision_reduction"
    ),
}
_MIXED = "set in more than one way"
"""Instead of a value that torch refuses to read, because both its older and its newer interface
have been used."""


class TorchSettings:
    """The settings of torch when it is made, of this thread and of the process."""

    def __init__(self) -> None:
        self._values = {name: _read(setting) for name, setting in _SETTINGS.items()}

    def changed(self) -> list[str]:
        """The names of the settings that differ now."""
        return [name for name, value in self._values.items() if _read(_SETTINGS[name]) != value]

    def restore(self) -> None:
        """Gives the settings that differ now their values back."""
        for name, value in self._values.items():
            if value != _MIXED and _read(_SETTINGS[name]) != value:
                _SETTINGS[name].write(value)


def _read(setting: _Setting) -> Any:
    try:
        return setting.read()
    except RuntimeError:
        return _MIXED
