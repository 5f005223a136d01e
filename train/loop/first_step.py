"""Checks that are made during the first step of an attempt, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from train.distributed.collectives import Collectives
from train.exits import UsageError
from train.loop.hidden_state import HiddenState
from train.setup.compile_check import check_compiled
from train.strategies.base import Strategy
from train.tasks.base import Task
from train.tasks.checked import count_of


class FirstStepChecks:
    """Checks what a task and a strategy assume of each other.

    ``compiled`` says whether the model was compiled, ``precision`` is that of the forward pass,
    ``warn`` shows a warning.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        *,
        compiled: bool,
        precision: str,
        warn: Callable[[str], None],
    ) -> None:
        self._task, self._strategy, self._warn = task, strategy, warn
        self._compiled, self._precision = compiled, precision

    def before_forward(self, model: nn.Module, batch: Any) -> None:
        """Compares the gradients of the compiled model with those of the model as written, and
        notes the model's state outside of parameters and buffers. ``batch`` is on the device."""
        if self._compiled:
            collectives = self._strategy.collectives
            check_compiled(self._task, model, batch, self._precision, collectives)
        self._hidden = HiddenState(model)

    def after_micro_batch(self, batch: Any, count: object) -> None:
        """Checks that ``count``, which the loss returned, is the task's count of the batch (on
        the host)."""
        expected = count_of(self._task, batch)
        if float(count) != expected:  # type: ignore[arg-type]
            raise UsageError(
                f"The loss of the task {self._task.config.task.use!r} returned a count of {count}, "
                f"but its count(batch) returns {expected} {self._task.unit} for the same batch; "
                "make both agree, because gradients are divided by the sum of count(batch) over "
                "all ranks."
            )

    def after_backward(self, collectives: Collectives) -> None:
        """Warns of state that is not saved. Checks for trainable parameters that the loss does not
        use, where the strategy does not allow them; collective."""
        strategy = self._strategy
        self._check_hidden_state()
        by_rank = collectives.all_gather_object(strategy.unused())
        unused = sorted({name for names in by_rank for name in names})
        remedy = strategy.unused_remedy(alike=all(names == unused for names in by_rank))
        if unused and remedy:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            raise UsageError(
                f"{', '.join(unused[:5])}{more} got no gradient in the first step, which the "
                f"strategy {strategy.setup.name} does not allow for trainable parameters; freeze "
                f"them (requires_grad_(False)), or {remedy}."
            )

    def _check_hidden_state(self) -> None:
        changed, added = self._hidden.changed(), self._hidden.added_buffers()
        del self._hidden  # the tensors that it compares
        if added:
            raise UsageError(
                f"The first step registered the buffer {added[0]}, which a model that is built to "
                "resume would lack; register it in the module's constructor, as None if it has no "
                "value yet."
            )
        if not changed:
            return
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        self._warn(
            f"The first step changed {', '.join(changed[:5])}{more} of the model, which is neither "
            "a parameter nor a persistent buffer: it is not saved and may differ between ranks. If "
            "results depend on it, register it as a buffer, or return it from get_extra_state()."
        )
