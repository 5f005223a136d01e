"""A space as the config of a W&B sweep, and the values that a sweep gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.contract import (
    ChoiceDimension,
    Dimension,
    FloatDimension,
    Space,
    UsageError,
    listed,
)
from launch.tune.settings import Settings
from launch.tune.values import label

METHODS = ("bayes", "random", "grid")
_WHAT_TO_DO = "restore the config of the sweep, or choose another run.dir for a new study"


def sweep_config(settings: Settings, method: str, name: str) -> dict[str, Any]:
    """The config of a sweep with the keys and the objective of a study; ``method``: one of
    ``METHODS``. The parameters have the dotted keys as names."""
    (objective,) = settings.objectives
    return {
        "name": name,
        "method": method,
        "metric": {"name": f"eval/{objective.name}", "goal": f"{objective.mode}imize"},
        "parameters": {
            each.key: _parameter(each, as_list=method == "grid")
            for each in settings.space.dimensions
        },
    }


def _parameter(dimension: Dimension, *, as_list: bool) -> dict[str, Any]:
    """A key as a parameter. Steps become lists: W&B rounds to multiples of a step, which need not
    be those that start at ``low``."""
    form = dimension.form
    if dimension.grid is not None and (as_list or isinstance(form, ChoiceDimension)):
        return {"values": [label(dimension, value) for value in dimension.grid]}
    assert not isinstance(form, ChoiceDimension)
    if form.low == form.high:
        return {"value": form.low}
    if form.step not in (None, 1):
        return {"values": dimension.grid}
    ends = {"min": form.low, "max": form.high}
    if isinstance(form, FloatDimension):
        return {"distribution": "log_uniform_values" if form.log else "uniform", **ends}
    if form.log:
        return {"distribution": "q_log_uniform_values", "q": 1, **ends}
    return {"distribution": "int_uniform", **ends}


def given_values(space: Space, arguments: Mapping[str, Any], sweep: str) -> dict[str, Any]:
    """The values of a run of a sweep by key, as Optuna stores them. Raises UsageError for what is
    not in the space: the config of a sweep can be changed at W&B."""
    found = {}
    for each in space.dimensions:
        entry = arguments.get(each.key)
        if not isinstance(entry, Mapping) or "value" not in entry:
            given = listed([str(name) for name in arguments]) or "nothing"
            raise UsageError(
                f"The W&B sweep {sweep} gives a run without a value for {each.key} (but for "
                f"{given}); {_WHAT_TO_DO}."
            )
        value = _converted(each, entry["value"])
        if value is None:
            raise UsageError(
                f"The W&B sweep {sweep} gives {each.key} the value {entry['value']!r}, which is "
                f"not in the space ({each.where}); {_WHAT_TO_DO}."
            )
        found[each.key] = value
    return found


def _converted(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna stores it; None if the space does not have it."""
    form = dimension.form
    if isinstance(form, ChoiceDimension):
        return value if value in [label(dimension, each) for each in form.choices] else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    steps = dimension.grid if form.step is not None else [value]
    nearest = min(steps or [], key=lambda step: abs(step - value))
    margin = 1e-9 * max(abs(form.low), abs(form.high))  # of the way through JSON and YAML
    if abs(nearest - value) > margin or not form.low - margin <= value <= form.high + margin:
        return None
    within = min(max(nearest, form.low), form.high)
    return float(within) if isinstance(form, FloatDimension) else int(within)
