"""Successive halving with continuation: trials pause at rungs, and the best of each go on.

Asynchronous, as in Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020): the
rungs are at ``min_steps``, ``min_steps * factor``, ``min_steps * factor ** 2`` ... steps. A paused
trial goes on from its checkpoint as soon as it is among the best ``1 / factor`` of those that have
reached its rung.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class RungTrial:
    """What decides about a trial."""

    number: int
    reports: Mapping[int, float]
    """Its evaluations by step."""
    promoted: int
    """How often it went on after a pause."""
    is_paused: bool
    """Whether it waits at the rung of this number."""


class HalvingPruner(BasePruner):
    """The rungs, and which trial goes on. Itself it prunes nothing."""

    def __init__(self, min_steps: int = 0, factor: int = 3) -> None:
        for name, value, least in (("min_steps", min_steps, 1), ("factor", factor, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}")
        self.min_steps, self.factor = min_steps, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """No: trials pause instead."""
        return False

    def rung(self, number: int) -> int:
        """The step of a rung, counted from 0: the first evaluation from there on decides."""
        return self.min_steps * int(self.factor**number)

    def value(self, trial: RungTrial, number: int) -> float | None:
        """The value by which a trial is judged at a rung; None if it has not reached it."""
        steps = [step for step in trial.reports if step >= self.rung(number)]
        return trial.reports[min(steps)] if steps and trial.promoted >= number else None

    def promotable(
        self, trials: Sequence[RungTrial], mode: str, *, at_least_one: bool
    ) -> list[RungTrial]:
        """The paused trials that may go on, those on the highest rung first. ``at_least_one``: no
        trial comes to a rung any more, so the best of the highest one goes on in any case."""
        found: list[RungTrial] = []
        for number in range(max((each.promoted for each in trials), default=0), -1, -1):
            values = {each.number: self.value(each, number) for each in trials}
            reached = [each for each in trials if values[each.number] is not None]
            reached.sort(key=lambda each: (_cost(values[each.number], mode), each.number))
            count = len(reached) // self.factor
            if at_least_one and reached and not found:
                count = max(1, count)
                at_least_one = False
            found += [
                each for each in reached[:count] if each.is_paused and each.promoted == number
            ]
        return found


def _cost(value: float | None, mode: str) -> float:
    if value is None or math.isnan(value):
        return math.inf
    return -value if mode == "max" else value
