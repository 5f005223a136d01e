"""The values of a trial's keys, as Optuna stores them and as the config takes them."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from launch.contract import ChoiceDimension, Dimension, FloatDimension, Space


def suggested(trial: optuna.Trial, dimension: Dimension) -> Any:
    """The value of a key for a trial, sampled unless the trial has it."""
    key, form = dimension.key, dimension.form
    if isinstance(form, ChoiceDimension):
        by_label = {label(dimension, choice): choice for choice in form.choices}
        return by_label[trial.suggest_categorical(key, list(by_label))]
    if isinstance(form, FloatDimension):
        return trial.suggest_float(key, form.low, form.high, step=form.step, log=form.log)
    return trial.suggest_int(key, form.low, form.high, step=form.step, log=form.log)


def distribution(dimension: Dimension) -> BaseDistribution:
    """What ``suggested`` samples from."""
    form = dimension.form
    if isinstance(form, ChoiceDimension):
        return CategoricalDistribution([label(dimension, choice) for choice in form.choices])
    if isinstance(form, FloatDimension):
        return FloatDistribution(form.low, form.high, log=form.log, step=form.step)
    return IntDistribution(form.low, form.high, log=form.log, step=form.step)


def assigned_in(space: Space, frozen: FrozenTrial) -> dict[str, Any]:
    """The values of a stored trial by key."""
    found: dict[str, Any] = {}
    for each in space.dimensions:
        if each.key not in frozen.params:
            continue
        value = frozen.params[each.key]
        if isinstance(each.form, ChoiceDimension):
            value = {label(each, choice): choice for choice in each.form.choices}[value]
        found[each.key] = value
    return found


def label(dimension: Dimension, value: Any) -> Any:
    """What the storage has for a value: a text for each choice, since storages and Optuna's own
    tools take only texts and numbers, and true and 1 as the same."""
    if not isinstance(dimension.form, ChoiceDimension):
        return value
    choices = dimension.form.choices
    plain = isinstance(value, str) and value not in [
        json.dumps(each) for each in choices if not isinstance(each, str)
    ]
    return value if plain else json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> str:
    """A value of the space for people: a text without quotes, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
