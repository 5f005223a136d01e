"""How a task's functions reach the model of a strategy.

The wrappers of DDP, FSDP2 and DeepSpeed prepare the model only where their ``forward`` is called. A
task calls what it likes: ``model(x)``, ``model.encode(x)``, or a part of the model. So the module
that they wrap is not the model, but one whose forward pass is the task's function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from train.tasks.base import Ratio

T = TypeVar("T")


class CallModel(Protocol):
    """Calls a function with the bare model and returns its result."""

    def __call__(self, function: Callable[[nn.Module], T], /) -> T:
        """``function(model)``."""


class ModelCall(nn.Module):
    """A module around ``model`` whose forward pass is a function of the model, in the precision of
    ``autocast``."""

    def __init__(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.model, self._autocast = model, autocast
        self._result: Any = None

    def forward(self, function: Callable[[nn.Module], Any]) -> list[Tensor]:
        """Returns what the gradient is computed of, for the hooks of the wrappers: the sum of a
        loss."""
        with self._autocast():
            self._result = function(self.model)
        return [self._result.sum] if isinstance(self._result, Ratio) else []

    def through(self, wrapper: nn.Module, function: Callable[[nn.Module], T]) -> T:
        """The result of ``function(model)``, called by the forward pass of ``wrapper``, a module
        around this one, or this one."""
        outputs = wrapper(function)
        result, self._result = self._result, None
        if isinstance(result, Ratio):
            result = result._replace(sum=outputs[0])  # with the hooks of the wrapper
        return result  # type: ignore[no-any-return]
