"""Activation checkpointing: blocks drop their activations and recompute them for backward
(Chen et al., 2016), which changes no result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from train.exits import UsageError, first_line
from train.process.diagnose import as_run_error


def checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Makes blocks drop their activations and recompute them for backward. Both passes draw the
    same random numbers and use the same buffers."""
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if torch.is_grad_enabled():
        args, kwargs = _without_cache(block, args, kwargs)
    # Compiled code takes no state between the passes; the compile check compares its gradients.
    function = forward if torch.compiler.is_compiling() else _Passes(block, forward)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _without_cache(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block of Hugging Face transformers without the cache of keys and values,
    to which both passes would add. It is for generation: training does not read it."""
    cache_utils = sys.modules.get("transformers.cache_utils")
    if cache_utils is None:
        return args, kwargs

    def without(value: Any) -> Any:
        if not isinstance(value, cache_utils.Cache):
            return value
        if value.get_seq_length():
            raise UsageError(
                f"activation_checkpointing is true, but {type(block).__name__} gets keys and "
                "values of earlier tokens (past_key_values), to which a recomputation would add "
                "again; set it to false."
            )
        return None

    kwargs = {name: without(value) for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return tuple(map(without, args)), kwargs


class _Passes:
    """The forward pass of a block, then its recomputation.

    The first may change buffers: running statistics, or the vectors of a spectral norm. The second
    starts from the same buffers as the first, and its changes are dropped.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block, self._forward = block, forward
        self._before: list[tuple[nn.Module, str, Tensor]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._again(self._before, *args, **kwargs)
        places = [
            (module, name, tensor, tensor._version, tensor.clone())
            for module in self._block.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        result = self._forward(*args, **kwargs)
        self._before = [
            (module, name, before)
            for module, name, tensor, version, before in places
            if module._buffers.get(name) is not tensor
            or tensor._version != version
            or isinstance(module, _NormBase)  # its kernels do not count their changes
        ]
        return result

    def _again(self, before: list[tuple[nn.Module, str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        now = [(module, name, module._buffers[name]) for module, name, _ in before]
        for module, name, tensor in before:
            module._buffers[name] = tensor.clone()  # there may be a third pass
        try:
            return self._forward(*args, **kwargs)
        except Exception as error:
            # torch ends a recomputation early by an exception of its own.
            if type(error).__name__ == "_StopRecomputationError" or as_run_error(error):
                raise
            raise UsageError(
                f"activation_checkpointing is true, but {type(self._block).__name__} fails when "
                f"it is recomputed for backward ({first_line(error)}); let it not change its "
                "arguments, or set activation_checkpointing to false."
            ) from error
        finally:
            for module, name, current in now:
                module._buffers[name] = current
