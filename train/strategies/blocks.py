"""A model's blocks: modules that are gathered, or recomputed for backward, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from train.exits import UsageError


def find_blocks(model: nn.Module, named: list[nn.Module], classes: list[str]) -> list[nn.Module]:
    """The modules of the given ``classes`` (names), else those of ``named``, else the outermost
    members of the model's module lists.

    Raises UsageError for a class that the model has no module of.
    """
    if classes:
        kinds = {type(module).__name__ for module in model.modules()}
        for name in classes:
            if name not in kinds:
                raise UsageError(
                    f"fsdp2.blocks names {name!r}, but the model has no module of this class; it "
                    f"has {', '.join(sorted(kinds))}."
                )
        return [m for m in model.modules() if type(m).__name__ in classes and m is not model]
    if named:
        return named
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            members = [m for m in module if next(m.parameters(), None) is not None]
            found += members
            inside |= {inner for member in members for inner in member.modules()}
    return found


def checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Makes blocks drop their activations and recompute them for backward (Chen et al., 2016).
    Both passes draw the same random numbers and use the same buffers."""
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    # Compiled code takes no state between the passes; the compile check compares its gradients.
    alone = torch.compiler.is_compiling() or next(block.buffers(), None) is None
    function = forward if alone else _Passes(block, forward)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


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
        finally:
            for module, name, current in now:
                module._buffers[name] = current
