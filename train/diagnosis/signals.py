"""What flows through a model: the outputs of its modules in one forward pass, and the norms of
weights, gradients and updates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.strategies.base import Strategy


@dataclass
class Output:
    """What a module returned in its calls during a forward pass, on this rank."""

    module: str
    kind: str
    """The name of its class."""
    is_finite: bool
    is_zero: bool
    """Whether all elements are 0."""
    same_for_all: bool
    """Whether all samples (the entries of the first dimension) have the same output although their
    inputs differ."""


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[Output]]:
    """Fills the list with the outputs of the modules that have no submodules, in the order of their
    calls. Waits for the device at each call."""
    found: list[Output] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            return
        given = _first_tensor(inputs)
        found.append(
            Output(
                module=name or "the model",
                kind=type(module).__name__,
                is_finite=bool(torch.isfinite(tensor).all()),
                is_zero=not bool(tensor.count_nonzero()),
                same_for_all=_is_same(tensor) and given is not None and not _is_same(given),
            )
        )

    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: note(name, module, inputs, output)
        )
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return None


def _is_same(tensor: Tensor) -> bool:
    """Whether there are several samples and all are equal."""
    return bool(tensor.dim() and len(tensor) > 1 and (tensor == tensor[:1]).all())


@dataclass
class Norms:
    """Of one trainable parameter."""

    weight: float
    gradient: float | None
    """None where the strategy does not keep gradients."""
    digest: tuple[float, float]
    """Two sums over its elements: equal where it has not changed."""


def parameter_norms(strategy: Strategy) -> dict[str, Norms]:
    """The norms of all trainable parameters, by name, with the gradients of the last step after
    clipping; collective. Holds one unsharded parameter at a time."""
    found: dict[str, Norms] = {}
    for key, tensor in strategy.full_tensors():
        kind, _, name = key.partition("/")
        values = tensor.detach().double()
        norm = float(values.norm())
        if kind == "weights":
            positions = torch.arange(values.numel(), device=values.device) % 1009 + 1.0
            digest = float(values.sum()), float((values.flatten() * positions).sum())
            found[name] = Norms(norm, None, digest)
        elif name in found:
            found[name].gradient = norm
    return found
