"""How far a run has come: with the tensors, the whole state that a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from train.data.ledger import Skip
from train.exits import NotFiniteError


class SkippedStep(NamedTuple):
    """A step without an update."""

    why: Skip
    text: str
    """The reason in words, to end a sentence with."""


@dataclass
class Progress:
    """The counters of a run. A checkpoint stores them as JSON."""

    step: int = 0
    """Optimiser steps taken; the next one is number ``step + 1``."""
    position: int = 0
    """Samples consumed from the training stream."""
    skipped_steps: int = 0
    """Steps without an update, because the loss or the gradient norm was not finite or a spike."""
    spikes: int = 0
    """Those of them that were spikes."""
    skipped_in_a_row: int = 0
    evaluated: dict[str, float] = field(default_factory=dict)
    """The metrics of the newest evaluation."""
    evaluated_step: int | None = None
    """The step of the newest evaluation."""
    evaluation_due: bool = False
    """An evaluation was started at this step but not completed, because of a stop request."""

    def state_dict(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the counters of a checkpoint. Those that it does not have keep their values."""
        for name in vars(self).keys() & state.keys():
            setattr(self, name, state[name])

    def advance(self, samples: int) -> None:
        """Counts a step over ``samples`` samples."""
        self.step += 1
        self.position += samples

    def record_evaluation(self, metrics: dict[str, float]) -> None:
        """Records an evaluation of the present step."""
        self.evaluated, self.evaluated_step, self.evaluation_due = metrics, self.step, False

    def record_skipped(self, skipped: Sequence[SkippedStep | None], limit: int) -> None:
        """Counts the skipped ones of the last ``len(skipped)`` steps; None for a step that was not.

        Raises NotFiniteError where more than ``limit`` steps in a row were skipped.
        """
        for step, skip in enumerate(skipped, start=self.step - len(skipped) + 1):
            self.skipped_steps += skip is not None
            self.spikes += skip is not None and skip.why == Skip.SPIKE
            self.skipped_in_a_row = 0 if skip is None else self.skipped_in_a_row + 1
            if skip and self.skipped_in_a_row > limit:
                what = "a spike or not finite" if skip.why == Skip.SPIKE else "not finite"
                raise NotFiniteError(
                    f"The loss or the gradient norm was {what} for more than {limit} steps in "
                    f"a row, the last of them step {step} (optim.max_skipped_steps is {limit}); "
                    f"{_advice(none_taken=self.skipped_in_a_row == step)}"
                )

    def ensure_trained(self) -> None:
        """Raises NotFiniteError where every step was skipped."""
        if self.step and self.skipped_in_a_row == self.step:
            raise NotFiniteError(
                f"The loss or the gradient norm was not finite in each of the {self.step} steps; "
                f"{_advice(none_taken=True)}"
            )


def _advice(*, none_taken: bool) -> str:
    if none_taken:
        return "the weights are still the initial ones, so check the task's loss and the data."
    return "lower optim.lr, set optim.clip_norm, or check the data."
