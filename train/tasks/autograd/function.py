"""A function whose derivative is written by hand: a subclass of torch.autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Legendre3(torch.autograd.Function):
    """The Legendre polynomial of degree 3, element by element: P3(x) = (5 x^3 - 3 x) / 2.

    ``forward`` and ``setup_context`` are separate, so that torch.func can transform the function.
    The backward pass consists of differentiable operations, so it has a derivative itself.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """P3 of x, of any shape and any floating point type."""
        return 0.5 * (5.0 * x**3 - 3.0 * x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the input. What is saved so is freed after the backward pass, and an in-place
        change of it in between is an error; an attribute of ``ctx`` has neither."""
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient times P3'(x) = 1.5 (5 x^2 - 1)."""
        (x,) = ctx.saved_tensors
        derivative: Tensor = 1.5 * (5.0 * x**2 - 1.0)
        return gradient * derivative


class Legendre(nn.Module):
    """Legendre3 as an activation function."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        apply: Any = Legendre3.apply
        result: Tensor = apply(x)
        return result
