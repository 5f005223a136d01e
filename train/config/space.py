"""The space of a study: which config keys its trials vary, and between which values.

    optim.lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
    model.channels: {type: int, low: 8, high: 32, step: 8}
    optim.use: {type: categorical, choices: [adamw, sgd]}
    optim.momentum: {type: float, low: 0.5, high: 0.99, when: {optim.use: sgd}}

Each key is one of the config, in dotted form. A key with ``when`` is set only in trials in which
the other keys have one of the values that it names; elsewhere the config's own value stays.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from train.config.compose import Composed, compose, is_key
from train.config.explain import explain
from train.config.load import LoadedConfig, check, load_config
from train.exits import UsageError
from train.section import Section
from train.suggest import did_you_mean

Assignment = dict[str, Any]
"""A value for each key that is active."""
_MOST_EXTREMES = 32
"""Above this number of combinations of extreme values, each key's are validated one at a time."""
_OWN = {"run.dir": "the study sets it for each trial", "run.name": "the study sets it"}


class FloatDimension(Section):
    """A range of floats, both ends included."""

    type: Literal["float"]
    """float."""
    low: float
    """The smallest value."""
    high: float
    """The largest value."""
    log: bool = False
    """Whether the logarithm is uniform, instead of the value."""
    step: float | None = Field(None, gt=0.0)
    """Distance of the values from one another; null for any value."""
    when: dict[str, Any] = {}
    """Other keys, each with the value or the list of values at which this key is active."""


class IntDimension(Section):
    """A range of integers, both ends included."""

    type: Literal["int"]
    """int."""
    low: int
    """The smallest value."""
    high: int
    """The largest value."""
    log: bool = False
    """Whether the logarithm is uniform, instead of the value."""
    step: int = Field(1, ge=1)
    """Distance of the values from one another."""
    when: dict[str, Any] = {}
    """Other keys, each with the value or the list of values at which this key is active."""


class ChoiceDimension(Section):
    """A list of values without an order."""

    type: Literal["categorical"]
    """categorical."""
    choices: list[Any] = Field(min_length=1)
    """The values: numbers, texts, true, false, null, lists or sections."""
    when: dict[str, Any] = {}
    """Other keys, each with the value or the list of values at which this key is active."""


_TYPES: dict[str, type[Section]] = {
    "float": FloatDimension,
    "int": IntDimension,
    "categorical": ChoiceDimension,
}


@dataclass(frozen=True)
class Dimension:
    """One key of the space."""

    key: str
    form: FloatDimension | IntDimension | ChoiceDimension
    where: str
    """The place in the space file: FILE:LINE."""
    when: Mapping[str, Sequence[Any]]
    """Keys of the space, each with the values at which this one is active."""

    @property
    def extremes(self) -> list[Any]:
        """All choices, or both ends of the range."""
        if isinstance(self.form, ChoiceDimension):
            return list(self.form.choices)
        return list(dict.fromkeys((self.form.low, self.form.high)))

    @property
    def grid(self) -> list[Any] | None:
        """All values; None for a range of floats without a step."""
        form = self.form
        if isinstance(form, ChoiceDimension):
            return list(form.choices)
        if isinstance(form, IntDimension):
            return list(range(form.low, form.high + 1, form.step))
        if form.low == form.high:
            return [form.low]
        if form.step is None:
            return None
        count = round((form.high - form.low) / form.step) + 1
        return [min(form.low + i * form.step, form.high) for i in range(count)]


@dataclass(frozen=True)
class Space:
    """The keys that a study varies. A key stands after those that its ``when`` names."""

    dimensions: tuple[Dimension, ...]
    values: Mapping[str, Any]
    """What the file has, for records."""

    def is_active(self, dimension: Dimension, assigned: Mapping[str, Any]) -> bool:
        """Whether the key is set in a trial that has assigned these values to those before it."""
        return all(
            key in assigned and _among(assigned[key], allowed)
            for key, allowed in dimension.when.items()
        )

    def overrides(self, assigned: Mapping[str, Any]) -> list[str]:
        """The values as ``key=value`` words for a command line."""
        return [f"{key}={_as_yaml(value)}" for key, value in assigned.items()]

    def load(
        self, files: Sequence[str], overrides: Sequence[str], assigned: Mapping[str, Any]
    ) -> LoadedConfig:
        """The config of a trial; messages name the space file as the origin of its values. Raises
        UsageError."""
        places = {each.key: each.where for each in self.dimensions if each.key in assigned}
        words = [*overrides, *self.overrides(assigned)]
        return load_config(files, words, runs=False, places=places)

    def grid(self) -> Iterator[Assignment]:
        """Each combination of all values; the last key varies fastest. Raises UsageError for a
        range without a step."""
        for each in self.dimensions:
            if each.grid is None:
                raise UsageError(
                    f"{each.key} is a range of floats without a step ({each.where}), of which a "
                    "grid has no values; set step or choices, or use another --sampler."
                )
        return self._combinations({each.key: each.grid or [] for each in self.dimensions}, 0, {})

    def extremes(self) -> list[Assignment]:
        """Combinations of the extreme values, each value in at least one. The first has the first
        value of each key."""
        options = {each.key: each.extremes for each in self.dimensions}
        found = list(itertools.islice(self._combinations(options, 0, {}), _MOST_EXTREMES + 1))
        if len(found) <= _MOST_EXTREMES:
            return found
        last = {key: values[-1:] for key, values in options.items()}
        found = [found[0], next(self._combinations(last, 0, {}))]
        for each in self.dimensions:
            found += [self._with(each, value) for value in each.extremes]
        return found

    def _with(self, dimension: Dimension, value: Any) -> Assignment:
        """An assignment in which the key is active and has this value."""
        options = {each.key: each.extremes[:1] for each in self.dimensions}
        options[dimension.key] = [value]
        named = {each.key: each for each in self.dimensions}
        pending = [dimension]
        while pending:
            for key, allowed in pending.pop().when.items():
                options[key] = [v for v in allowed if _among(v, options[key])] or list(allowed)
                pending.append(named[key])
        for found in itertools.islice(self._combinations(options, 0, {}), 4096):
            if dimension.key in found:
                return found
        raise UsageError(
            f"{dimension.key} is never active: its conditions (when) cannot all hold at once "
            f"({dimension.where}); correct them."
        )

    def _combinations(
        self, options: Mapping[str, Sequence[Any]], index: int, before: Assignment
    ) -> Iterator[Assignment]:
        if index == len(self.dimensions):
            yield before
            return
        dimension = self.dimensions[index]
        if not self.is_active(dimension, before):
            yield from self._combinations(options, index + 1, before)
            return
        for value in options[dimension.key]:
            assigned = {**before, dimension.key: value}
            yield from self._combinations(options, index + 1, assigned)


def load_space(file: str) -> Space:
    """Reads a space file. Raises UsageError with one sentence per problem."""
    return _space(compose([file], []), file)


def stored_space(values: Mapping[str, Any], file: str) -> Space:
    """The space whose ``values`` a file has recorded. Raises UsageError."""
    return _space(Composed(dict(values), dict.fromkeys(values, file)), file)


def _space(composed: Composed, file: str) -> Space:
    problems: list[str] = []
    found: dict[str, Dimension] = {}
    for key, entry in composed.values.items():
        try:
            found[key] = _dimension(key, entry, composed)
        except UsageError as error:
            problems += str(error).splitlines()
    if problems:
        raise UsageError("\n".join(problems))
    if not found:
        raise UsageError(
            f"{file} has no keys; name at least one, such as "
            "`optim.lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}`."
        )
    for dimension in found.values():
        _check_conditions(dimension, found)
    return Space(tuple(_ordered(found)), composed.values)


def check_space(
    space: Space, files: Sequence[str], overrides: Sequence[str], world_size: int
) -> LoadedConfig:
    """Validates the configs of the extreme values, with what a run of ``world_size`` ranks needs.

    Returns the config with the first value of each key. Raises UsageError.
    """

    def load(assigned: Mapping[str, Any]) -> LoadedConfig:
        loaded = space.load(files, overrides, assigned)
        check(loaded.config, loaded.composed, world_size)
        return loaded

    def told_without_space() -> str:
        try:
            load({})
        except UsageError as error:
            return str(error)
        return ""

    first: LoadedConfig | None = None
    for assigned in space.extremes():
        try:
            loaded = load(assigned)
        except UsageError as error:
            told = str(error)
            is_of_space = any(key in told for key in assigned)
            if len(assigned) > 1 and not is_of_space and told != told_without_space():
                values = " ".join(space.overrides(assigned))
                raise UsageError(f"With {values} of the space: {told}") from None
            raise
        first = first or loaded
    assert first is not None
    return first


def _dimension(key: str, entry: Any, composed: Composed) -> Dimension:
    where = composed.origin(key)
    if not is_key(key):
        raise UsageError(f"{key!r} ({where}) is not a config key such as optim.lr; correct it.")
    if key in _OWN:
        raise UsageError(f"{key} ({where}) cannot be in the space: {_OWN[key]}; remove it.")
    example = f"write `{key}: {{type: float, low: ..., high: ...}}`"
    if not isinstance(entry, Mapping):
        raise UsageError(
            f"{key} is {entry!r} ({where}), but must be a mapping with a type; {example}, or set "
            "a single value in the config."
        )
    if "type" not in entry:
        inner = next((name for name, value in entry.items() if isinstance(value, Mapping)), None)
        if inner is not None:
            raise UsageError(
                f"{key} has no type ({where}); write the keys of a space dotted, as "
                f"`{key}.{inner}: ...`."
            )
        raise UsageError(
            f"{key} has no type ({where}); set type to one of {', '.join(_TYPES)}: {example}."
        )
    form = _TYPES.get(entry["type"]) if isinstance(entry["type"], str) else None
    if form is None:
        raise UsageError(
            f"{key}.type must be one of {', '.join(_TYPES)}, but is {entry['type']!r} "
            f"({composed.where(f'{key}.type')}){did_you_mean(str(entry['type']), _TYPES)}"
        )
    _check_fields(key, entry, form, composed)
    *sections, last = key.split(".")
    nested: dict[str, Any] = {last: dict(entry)}
    for section in reversed(sections):
        nested = {section: nested}
    try:
        value: Any = form.model_validate(dict(entry))
    except ValidationError as error:
        place = Composed(nested, dict(composed.origins))
        raise explain(error, form, place, f"{key}.") from None
    _check_form(key, value, composed)
    when = {
        str(name): allowed if isinstance(allowed, list) else [allowed]
        for name, allowed in value.when.items()
    }
    return Dimension(key, value, where, when)


def _check_fields(
    key: str, entry: Mapping[str, Any], form: type[Section], composed: Composed
) -> None:
    """Raises UsageError for a field that is unknown or missing."""
    for name in entry:
        if name not in form.model_fields:
            hint = did_you_mean(str(name), form.model_fields)
            hint = f"; it has {', '.join(form.model_fields)}." if hint == "." else hint
            raise UsageError(
                f"{key}.{name} is not a field of type: {entry['type']} "
                f"({composed.where(f'{key}.{name}')}){hint}"
            )
    missing = [n for n, info in form.model_fields.items() if info.is_required() and n not in entry]
    if missing:
        raise UsageError(
            f"{key} needs {' and '.join(missing)} ({composed.where(key)}), which type: "
            f"{entry['type']} requires; set {'it' if len(missing) == 1 else 'them'} there."
        )


def _check_form(
    key: str, form: FloatDimension | IntDimension | ChoiceDimension, composed: Composed
) -> None:
    """Raises UsageError for fields that do not fit together."""

    def place(name: str) -> str:
        return composed.where(f"{key}.{name}")

    if isinstance(form, ChoiceDimension):
        texts = [_as_yaml(choice) for choice in form.choices]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise UsageError(
                f"{key}.choices has {twice} twice ({place('choices')}); remove one of them."
            )
        return
    if form.low > form.high:
        raise UsageError(
            f"{key}.low is {form.low} ({place('low')}), which is greater than high, {form.high}; "
            "swap them."
        )
    if form.log and form.low <= 0:
        raise UsageError(
            f"{key}.low must be greater than 0 with log: true, but is {form.low} "
            f"({place('low')}); raise it, or remove log."
        )
    stepped = form.step is not None and form.step != 1 if form.type == "int" else form.step
    if form.log and stepped:
        raise UsageError(
            f"{key} has both log and step ({place('step')}); remove one of them, or list the "
            "values as choices."
        )
    if form.step is not None:
        count = (form.high - form.low) / form.step
        if not math.isclose(count, round(count), abs_tol=1e-9):
            nearest = form.low + math.floor(count) * form.step
            raise UsageError(
                f"{key}.high is {form.high} ({place('high')}), which is not low ({form.low}) plus "
                f"a multiple of step ({form.step}); set it to {nearest:g}, or change step."
            )


def _check_conditions(dimension: Dimension, found: Mapping[str, Dimension]) -> None:
    key, where = dimension.key, dimension.where
    for other in found:
        if key.startswith(f"{other}."):
            raise UsageError(
                f"{key} ({where}) is inside {other} ({found[other].where}), which the space sets "
                "as a whole; remove one of them."
            )
    for name, allowed in dimension.when.items():
        if name not in found or name == key:
            hint = did_you_mean(name, [other for other in found if other != key])
            raise UsageError(
                f"{key}.when names {name!r} ({where}), which is not another key of the space{hint}"
            )
        known = found[name].grid
        for value in allowed:
            if known is None:
                raise UsageError(
                    f"{key}.when names {name} ({where}), a range of floats without a step; only "
                    "keys with single values can be a condition."
                )
            if not _among(value, known):
                texts = [_as_yaml(each) for each in known]
                hint = did_you_mean(_as_yaml(value), texts)
                hint = f"; its values are {', '.join(texts[:8])}." if hint == "." else hint
                raise UsageError(
                    f"{key}.when has {name}: {_as_yaml(value)} ({where}), a value that {name} "
                    f"does not have in the space{hint}"
                )
        if not allowed:
            raise UsageError(f"{key}.when has no value for {name} ({where}); name one.")


def _ordered(found: Mapping[str, Dimension]) -> list[Dimension]:
    """In the order of the file, but each after those that its ``when`` names."""
    placed: dict[str, Dimension] = {}
    rest = dict(found)
    while rest:
        ready = next((k for k, d in rest.items() if all(name in placed for name in d.when)), None)
        if ready is None:
            names = ", ".join(rest)
            raise UsageError(
                f"The conditions (when) of {names} depend on each other in a circle "
                f"({next(iter(rest.values())).where}); remove one of them."
            )
        placed[ready] = rest.pop(ready)
    return list(placed.values())


def _among(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is one of others; true is not 1."""
    return _as_yaml(value) in map(_as_yaml, values)


def _as_yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
