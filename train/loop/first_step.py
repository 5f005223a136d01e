"""Checks that are made during the first step of an attempt, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train.exits import UsageError
from train.loop.forward_effects import BufferChanges, RefusedEffects
from train.loop.hidden_state import HiddenState
from train.setup.compile_check import check_compiled
from train.strategies.base import Strategy
from train.strategies.parameters import check_dense
from train.suggest import listed
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

    def before_forward(self, batch: Any) -> None:
        """Compares the gradients of the compiled model with those of the model as written, and
        notes the model's state outside of parameters and buffers. ``batch`` is on the device."""
        strategy = self._strategy
        if any(strategy.collectives.all_reduce_ints([int(not torch.is_grad_enabled())])):
            raise UsageError(
                "torch's gradient mode is off at the start of the first step; a method of the task "
                "has switched it off (torch.set_grad_enabled, or torch.no_grad without its end): "
                "restore it there."
            )
        if self._compiled:
            check_compiled(
                self._task,
                strategy.call,
                strategy.bare_model,
                batch,
                self._precision,
                strategy.collectives,
            )
        model = strategy.bare_model
        self._hidden, self._buffers = HiddenState(model), BufferChanges(model)
        self._refused = RefusedEffects(strategy, compiled=self._compiled)

    @contextmanager
    def during_forward(self) -> Iterator[None]:
        """Surrounds a forward pass: compares the calls of modules between ranks, and watches what
        they change."""
        with self._buffers.watching(), self._refused.watching():
            yield

    def before_backward(self, loss: Tensor) -> None:
        """Checks that the gradients of ``loss`` can be exchanged, and that the forward pass has
        left the parameters and the modes as they were; collective."""
        self._refused.check("first step")
        check_dense(loss)

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

    def after_backward(self) -> None:
        """Warns of state that is not saved. Checks for trainable parameters that the loss does not
        use, where the strategy does not allow them; collective."""
        self._check_hidden_state()
        self._strategy.check_unused()

    def _check_hidden_state(self) -> None:
        if changed := self._hidden.changed():
            self._warn(
                f"The first step changed {listed(changed)} of the model, which is neither a "
                "parameter nor a persistent buffer: it is not saved and may differ between ranks. "
                "If results depend on it, register it as a buffer, or return it from "
                "get_extra_state()."
            )
        if changed := self._buffers.names:
            self._warn(
                f"Forward passes change the buffers {listed(changed, 3)}, which are those of rank "
                "0's micro-batches: what is computed from them depends on the number of ranks and "
                "on batch.micro_batch_size."
            )
        del self._hidden  # the tensors that it compares
