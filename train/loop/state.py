"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far the run has come; together with the tensors this is all there is to resume."""

    step: int = 0
    """Optimiser steps taken; the next one is number ``step + 1``."""
    position: int = 0
    """Samples consumed from the training stream."""
    skipped_steps: int = 0
    """Steps whose update was left out because something was not finite."""
    skipped_in_a_row: int = 0
    evaluated: dict[str, float] = field(default_factory=dict)
    """The newest evaluation."""
    evaluation_due: bool = False
    """An evaluation was begun at this step and given up to stop."""
