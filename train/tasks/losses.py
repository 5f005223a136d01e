"""The loss of the built-in tasks: cross entropy, or a function of the user's by dotted path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from train.exits import UsageError
from train.imports import import_function
from train.section import name_or_path

if TYPE_CHECKING:
    from torch import Tensor

CROSS_ENTROPY = "cross_entropy"


def check_loss(use: str) -> str:
    """For the validator of a field ``loss``."""
    return name_or_path(use, [CROSS_ENTROPY], "module.path:function")


class Loss:
    """Sums a loss over the units of a batch. ``use``: "cross_entropy", or a dotted path.

    A function of the user's gets logits (N, C) float32 and targets (N,) int64 of the units that
    count, and returns the loss of each, (N,), or their sum, a scalar.
    """

    def __init__(self, use: str) -> None:
        self.is_cross_entropy = use == CROSS_ENTROPY
        self._use = use
        self._function: Callable[[Tensor, Tensor], Any] | None = None
        if not self.is_cross_entropy:
            self._function = import_function(use, "task.loss")
        self._is_checked = False

    def sum(self, logits: Tensor, targets: Tensor, *, ignore: int = -100) -> Tensor:
        """The summed loss of logits (N, C) for targets (N,), without targets ``ignore``."""
        from torch.nn import functional as F

        if self._function is None:
            return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
        counted = targets != ignore
        if not bool(counted.all()):
            logits, targets = logits[counted], targets[counted]
        losses = self._call(logits.float(), targets)
        if losses.dim() == 0 and not self._is_checked:
            self._check_sum(losses, logits.float(), targets)
        self._is_checked = True
        return losses.sum()

    def _call(self, logits: Tensor, targets: Tensor) -> Tensor:
        import torch

        assert self._function is not None
        losses = self._function(logits, targets)
        if not isinstance(losses, torch.Tensor) or losses.shape not in ((), (len(targets),)):
            shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses)
            raise UsageError(
                f"task.loss={self._use} returned {shape} for logits {tuple(logits.shape)}; return "
                f"a tensor with one loss per unit, shape ({len(targets)},), or their sum."
            )
        return losses

    def _check_sum(self, once: Tensor, logits: Tensor, targets: Tensor) -> None:
        """A scalar must be the sum: over each unit twice it is twice as large, a mean is not."""
        import torch

        devices = [logits.device] if logits.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            twice = self._call(torch.cat([logits, logits]), torch.cat([targets, targets]))
        if not torch.allclose(twice, 2 * once, rtol=1e-3):
            raise UsageError(
                f"task.loss={self._use} returned a scalar that is not the sum over the units "
                f"({once.item():.6g}, and {twice.item():.6g} with each unit twice); return the "
                "sum, or one loss per unit."
            )
