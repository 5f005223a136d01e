"""Statistics of gradients, recorded by hooks while the backward pass runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class GradientStatistics:
    """Watches the gradients of modules' outputs.

    Hooks on outputs work with each strategy, while those on parameters see shards or buckets. The
    numbers stay on the device until ``table``, so that no step waits for them. They are of the
    last micro-batch of this rank.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        """Watches each module of the model that contains no other."""
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(partial(self._after_forward, name))

    def _after_forward(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:  # not in an evaluation
            register: Any = output.register_hook
            register(partial(self._record, name))

    def _record(self, name: str, gradient: Tensor) -> None:
        size = gradient.detach().abs()
        self._latest[name] = torch.stack([size.mean(), size.max(), (size == 0).float().mean()])

    def table(self) -> str:
        """One line per module, from the output to the input: the mean and the largest size of a
        gradient, and the share of zeros. Waits for the device."""
        rows = [f"{'module':<12}{'mean':>12}{'largest':>12}{'zero':>8}"]
        for name, numbers in self._latest.items():
            mean, largest, zero = numbers.tolist()
            rows.append(f"{name:<12}{mean:>12.3e}{largest:>12.3e}{zero:>8.1%}")
        return "\n".join(rows)
