"""The result of a study as one HTML page."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from launch.contract import (
    ChoiceDimension,
    Dimension,
    StudyAxis,
    StudyData,
    StudyTrial,
    first_line,
    render_study,
    write_report,
)
from launch.tune.result import rows
from launch.tune.stored_study import STATES, StoredStudy
from launch.tune.values import as_text, assigned_in

PAGE_FILE = "study.html"
_FEWEST = 4
"""Finished trials below which no importance is estimated."""
_GOOD = 5
"""The best trials by which it is estimated, if there are enough."""


def write_page(study: StoredStudy, target: Path) -> None:
    """Writes the page. Raises UsageError if it cannot be written."""
    write_report(target, render_study(_data(study)))


def _data(study: StoredStudy) -> StudyData:
    trials = study.trials()
    importance, about = _importance(study, trials)
    return StudyData(
        name=f"Study {study.directory.absolute().name}",
        facts=_facts(study, trials),
        objectives=[(each.name, each.mode) for each in study.objectives],
        axes=[_axis(each) for each in study.space.dimensions],
        trials=[_trial(study, each) for each in trials],
        best=[each.number for each in study.best()],
        rows=rows(study),
        importance=importance,
        about_importance=about,
    )


def _facts(study: StoredStudy, trials: list[FrozenTrial]) -> dict[str, str]:
    states = Counter(STATES[each.state] for each in trials)
    facts = {"trials": str(len(trials)), **{state: str(n) for state, n in states.items()}}
    for index, objective in enumerate(study.objectives):
        better = min if objective.mode == "min" else max
        values = [each.values[index] for each in trials if STATES[each.state] == "finished"]
        if values:
            facts[f"best {objective.name} ({objective.mode})"] = f"{better(values):.5g}"
    facts |= {"sampler": study.sampler, "pruner": study.pruner}
    steps = [each.user_attrs.get("step", each.last_step) for each in trials]
    if any(steps):
        facts["steps of all trials"] = f"{sum(step or 0 for step in steps):,}"
    return facts


def _axis(dimension: Dimension) -> StudyAxis:
    form = dimension.form
    if isinstance(form, ChoiceDimension):
        return StudyAxis(dimension.key, choices=[as_text(each) for each in form.choices])
    return StudyAxis(dimension.key, float(form.low), float(form.high), form.log)


def _trial(study: StoredStudy, frozen: FrozenTrial) -> StudyTrial:
    ranges = {
        each.key for each in study.space.dimensions if not isinstance(each.form, ChoiceDimension)
    }
    params: dict[str, Any] = assigned_in(study.space, frozen)
    return StudyTrial(
        frozen.number,
        STATES[frozen.state],
        list(frozen.values) if frozen.values else None,
        {key: value if key in ranges else as_text(value) for key, value in params.items()},
        study.run_directory(frozen.number),
    )


def _importance(
    study: StoredStudy, trials: list[FrozenTrial]
) -> tuple[dict[str, dict[str, float]], str]:
    """The share of each key by objective, and how it was estimated or why it was not."""
    finished = sum(STATES[each.state] == "finished" for each in trials)
    if finished < _FEWEST:
        return {}, (
            f"Not estimated: {finished} trials have finished, and at least {_FEWEST} are needed."
        )
    good = max(0.1, min(0.5, _GOOD / finished))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that few trials give rough values, which is said
            found = {
                each.name: study.importance(index, good)
                for index, each in enumerate(study.objectives)
            }
    except ImportError as error:
        return {}, (
            f"Not estimated: Optuna's evaluator needs a library that cannot be imported "
            f"({first_line(error)})."
        )
    return found, (
        f"By Optuna's PED-ANOVA: how much the values of a key in the best {100 * good:.0f} % of "
        f"the {finished} finished trials differ from those in all of them. With few trials these "
        "are rough estimates. Pruned trials do not count."
    )
