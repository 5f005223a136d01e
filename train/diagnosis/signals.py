"""What flows through a model: the outputs of its modules in one forward pass, and the norms of
weights, gradients and updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.strategies.base import Strategy

WHOLE = "the model"
"""The name of the module that is the whole model."""


@dataclass
class Output:
    """What a module returned in its calls during a forward pass, on this rank."""

    module: str
    kind: str
    """The name of its class."""
    is_finite: bool
    finite_input: bool
    """Whether its input was finite."""
    is_zero: bool
    """Whether all elements are 0."""
    same_for_all: bool
    """Whether all samples (the entries of the first dimension) have the same output although their
    inputs differ."""
    same_input: bool
    """Whether all samples have the same floating-point input."""
    zero_input: bool
    """Whether that input is 0."""

    @property
    def origin(self) -> str:
        """The module, for a sentence about an output that is not finite."""
        before = "" if self.finite_input else ", whose input is not finite already"
        return f"{self.module} ({self.kind}){before}"

    def is_inside(self, other: Output) -> bool:
        """Whether the module is one of the submodules of another."""
        if other.module == WHOLE:
            return self.module != WHOLE
        return self.module.startswith(f"{other.module}.")


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[Output]]:
    """Fills the list with the outputs of all modules, in the order in which their calls end: those
    of submodules first. Waits for the device at each call. Of a model that torch.compile() has
    compiled as a whole, only the modules without submodules are watched."""
    found: list[Output] = []
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None

    def note(name: str, module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            return
        given = _first_tensor(inputs)
        same_input = given is not None and _is_same(given)
        found.append(
            Output(
                module=name or WHOLE,
                kind=type(module).__name__,
                is_finite=bool(torch.isfinite(tensor).all()),
                finite_input=given is None or bool(torch.isfinite(given).all()),
                is_zero=not bool(tensor.count_nonzero()),
                same_for_all=_is_same(tensor) and given is not None and not same_input,
                same_input=same_input and given is not None and given.is_floating_point(),
                zero_input=same_input and given is not None and not given.count_nonzero(),
            )
        )

    handles = [
        module.register_forward_hook(
            lambda module, inputs, given, output, name=name: note(
                name, module, [*inputs, *given.values()], output
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if not is_compiled or next(module.children(), None) is None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return _first_tensor(list(value.values()))
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
