"""Successive halving with continuation: trials pause at rungs, and the best of each go on.

Asynchronous, as in Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020): the
rungs are at ``min_steps``, ``min_steps * factor``, ``min_steps * factor ** 2`` ... steps. A paused
trial goes on from its checkpoint as soon as it is among the best ``1 / factor`` of those that have
reached its rung.

With several brackets it is Hyperband (Li et al., 2018): the trials of bracket B skip the first B
rungs, and are compared with each other only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

_MOST = 1_000_000
"""The longest rung that is accepted, as a multiple of the first one."""


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

    def __init__(self, min_steps: int = 0, factor: int = 3, brackets: int = 1) -> None:
        given = ("min_steps", min_steps, 1), ("factor", factor, 2), ("brackets", brackets, 1)
        for name, value, least in given:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}")
        if brackets * math.log(factor) > math.log(_MOST):
            raise ValueError("brackets must be less with this factor")
        self.min_steps, self.factor = min_steps, factor
        # Trials of each bracket in turn, as many as in Hyperband.
        self._turn = [
            bracket
            for bracket in range(brackets)
            for _ in range(
                math.ceil(brackets / (brackets - bracket) * factor ** (brackets - 1 - bracket))
            )
        ]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """No: trials pause instead."""
        return False

    def bracket(self, trial: int) -> int:
        """The bracket of a trial, by its number."""
        return self._turn[trial % len(self._turn)]

    def rung(self, trial: int, number: int) -> int:
        """The step of a rung of a trial, counted from 0: the first evaluation from there on
        decides."""
        return self.min_steps * int(self.factor ** (self.bracket(trial) + number))

    def value(self, trial: RungTrial, number: int) -> float | None:
        """The value by which a trial is judged at a rung; None if it has not reached it."""
        steps = [step for step in trial.reports if step >= self.rung(trial.number, number)]
        return trial.reports[min(steps)] if steps and trial.promoted >= number else None

    def promotable(
        self, trials: Sequence[RungTrial], mode: str, *, at_least_one: bool
    ) -> list[RungTrial]:
        """The paused trials that may go on, those on the highest rung first. ``at_least_one``: no
        trial comes to a rung any more, so the best of the highest one goes on in any case, in each
        bracket."""
        found: list[tuple[int, RungTrial]] = []
        for bracket in set(self._turn):
            mine = [each for each in trials if self.bracket(each.number) == bracket]
            found += self._of_bracket(mine, mode, at_least_one=at_least_one)
        return [each for _, each in sorted(found, key=lambda pair: -pair[0])]

    def _of_bracket(
        self, trials: Sequence[RungTrial], mode: str, *, at_least_one: bool
    ) -> list[tuple[int, RungTrial]]:
        """Those of a bracket, the best first, each with the step of its rung."""
        found: list[tuple[int, RungTrial]] = []
        for number in range(max((each.promoted for each in trials), default=0), -1, -1):
            values = {each.number: self.value(each, number) for each in trials}
            reached = [each for each in trials if values[each.number] is not None]
            reached.sort(key=lambda each: (_cost(values[each.number], mode), each.number))
            count = len(reached) // self.factor
            if at_least_one and reached:
                count, at_least_one = max(1, count), False
            found += [
                (self.rung(each.number, number), each)
                for each in reached[:count]
                if each.is_paused and each.promoted == number
            ]
        return found


def _cost(value: float | None, mode: str) -> float:
    if value is None or math.isnan(value):
        return math.inf
    return -value if mode == "max" else value
