"""Errors of a config are one sentence per key, with the key, the value and its origin."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationError, WrapValidator, create_model

from train.config.compose import Composed
from train.config.explain import explain
from train.config.keys import known_keys
from train.config.schema import config_class
from train.section import Section
from train.tasks.registry import BUILT_IN, find_task

VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 1.5, -0.5, 10**30, float("nan"), "", "nonsense", "x" * 999),
    *([], [1], ["nonsense"], [{}], [[]], {}, {"stranger": 1}, {"stranger": {"deep": [1]}}),
]
"""Of each JSON type, good and bad."""

PYDANTIC = re.compile(
    r"constrained|union|function|literal|nullable|instance|dictionary|validat(or|ion)\b(?!=)"
    r"|[Ii]nput|should|\bint\b|\bfloat\b|\bstr\b|\bbool\b|\bdict\b|list\["
)
"""Words of pydantic and Python in place of those of the config."""

SENTENCES = [
    r"(?P<key>\S+) must be .+, but is (?P<value>.+) \((?P<origin>from line \d+|default)\)[.;].*",
    r"(?P<key>\S+) has a key that must be .+, but is (?P<value>.+) \((?P<origin>from line \d+)\)\.",
    r"(?P<key>\S+) is not a known key \(value (?P<value>.+), (?P<origin>from line \d+)\)[.;].*",
    r"(?P<key>\S+) is required but not set; set it in a config file or as (?P=key)(\.\S+)?=.*",
    r"(?P<key>\S+) is required but not set; set it in the list \S+ \((?P<origin>from line \d+)\)\.",
    r"(?P<key>\S+) .+ \(the section \S+ is (?P<origin>from line \d+|default)\)\.",
    r"(?P<key>\S+) .+ \(\S+ (?P<origin>from line \d+)(, \S+ from line \d+)*\)\.",
]


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the values with one more value at a dotted key."""
    result = copy.deepcopy(values)
    inside, parts = result, key.split(".")
    for part in parts[:-1]:
        if not isinstance(inside.get(part), dict):
            inside[part] = {}
        inside = inside[part]
    inside[parts[-1]] = copy.deepcopy(value)
    return result


def origins(values: Any, prefix: str = "") -> list[str]:
    """The origin of every dotted key of these values, as ``compose`` finds them in a file."""
    if not isinstance(values, Mapping):
        return []
    keys = [f"{prefix}{key}" for key in values]
    return [*keys, *itertools.chain(*(origins(values[k], f"{prefix}{k}.") for k in values))]


def problems(model: type[Section], values: dict[str, Any]) -> str:
    """The error text for a config; empty if the config is valid."""
    composed = Composed(values, {key: f"line {n}" for n, key in enumerate(origins(values), 1)})
    try:
        model.model_validate(values)
    except ValidationError as error:
        return str(explain(error, model, composed))
    return ""


def at(values: Any, key: str) -> Any:
    """The value at a dotted key; raises KeyError if there is none."""
    for part in key.split("."):
        if isinstance(values, Mapping):
            values = {str(name): value for name, value in values.items()}[part]
        elif isinstance(values, list | tuple) and part.isdecimal():
            values = dict(enumerate(values))[int(part)]
        else:
            raise KeyError(key)
    return values


def check(text: str, values: dict[str, Any]) -> None:
    """Checks that each line is a sentence about a key that the values contain, or that is
    missing."""
    seen = set()
    for line in text.splitlines():
        match = next(filter(None, (re.fullmatch(s, line) for s in SENTENCES)), None)
        assert match, line
        key = match["key"]
        assert key not in seen, f"two lines about {key}:\n{text}"
        seen.add(key)
        shown = match.groupdict().get("value")
        if "is required" in line:
            with pytest.raises(KeyError):
                at(values, key)
            parent = key.rpartition(".")[0]
            assert not parent or isinstance(at(values, parent), Mapping), line
        elif shown is not None and "has a key" not in line:
            value = repr(at(values, key))
            assert shown in (value, f"{value[:200]}..."), line
        if shown is None or "nonsense" not in shown:
            ours = (
                line.partition("; the keys of ")[0]
                .replace(key, "KEY")
                .replace("module.path:function", "PATH")
            )
            assert not PYDANTIC.search(ours), line


@pytest.mark.parametrize("use", BUILT_IN)
def test_every_field_of_the_built_in_tasks_with_every_kind_of_value(use: str) -> None:
    model = config_class(find_task(use, "test"))
    good = {"task": {"use": use}, "batch": {"global_batch_size": 8}, "length": {"steps": 3}}
    refused = set()
    for key in known_keys(model):
        if key == "checkpoint.mirror.url" or not key.startswith("checkpoint.mirror."):
            start = good
        else:
            start = put(good, "checkpoint.mirror.url", "s3://x")
        for value in VALUES:
            values = put(start, key, value)
            text = problems(model, values)
            check(text, values)
            refused |= {key} & {re.split(r"[ :]", line)[0] for line in text.splitlines()}
    free = {"optim.options", "checkpoint.mirror.options", "zero.config"}
    assert set(known_keys(model)) - refused <= free, "fields that accept every value"


class Stage(Section):
    """A nested model."""

    name: str
    steps: int = Field(1, ge=1)


class Warm(Section):
    """A member of a discriminated union."""

    kind: Literal["warm"]
    steps: int = 1


class Cool(Section):
    """Another member."""

    kind: Literal["cool"]
    ratio: float = Field(0.5, le=1.0)


def _even(value: Any) -> Any:
    if isinstance(value, int) and value % 2:
        raise ValueError("an even number")
    return value


Even = Annotated[int, AfterValidator(_even)]
Wrapped = Annotated[float, WrapValidator(lambda value, handler: handler(value)), Field(lt=9)]
Phase = Annotated[Warm | Cool, Field(discriminator="kind")]


class Everything(Section):
    """Unions of all kinds."""

    ratio_or_count: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)] = 1
    size: Even | Literal["auto", "none"] | None = None
    stage: Stage | None = None
    stages: list[Stage] = []
    one_or_many: Stage | list[Stage] | None = None
    by_name: dict[str, Stage | Even] = {}
    by_number: dict[int, Stage] = {}
    phase: Phase | None = None
    phases: list[Phase] = []
    kinds: list[Literal["a", "b"]] | Literal["all"] = "all"
    inner: Annotated[Even | Wrapped, AfterValidator(_even)] | str | None = None
    options: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ratio_or_count", 0, "ratio_or_count must be greater than 0.0 or at least 1, but is 0"),
        ("ratio_or_count", "x", "ratio_or_count must be a number or a whole number, but is 'x'"),
        ("size", 3, "size must be an even number or one of auto, none, but is 3"),
        ("size", "autp", "one of auto, none, but is 'autp' (from line 1); did you mean auto?"),
        ("stage.nam", "x", "stage.nam is not a known key (value 'x', from line 2); did you mean st"),
        ("stages", [{"name": "a"}, {"name": 1}], "stages.1.name must be text, but is 1"),
        ("stages", [{"name": "a", "stesp": 1}], "stages.0.stesp is not a known key (value 1, from "
         "line 1); did you mean stages.0.steps?"),
        ("one_or_many", [{"name": 1}], "one_or_many.0.name must be text, but is 1"),
        ("one_or_many", {"name": 1}, "one_or_many.name must be text, but is 1"),
        ("one_or_many", 3, "one_or_many must be a mapping of keys to values or a list, but is 3"),
        ("by_name", {"a": {"name": 1}}, "by_name.a.name must be text, but is 1"),
        ("by_name", {"a": 3}, "by_name.a must be a mapping of keys to values or an even number"),
        ("by_number", {"a": {"name": "x"}}, "by_number.a has a key that must be a whole number"),
        ("phase", {"kind": "hot"}, "phase.kind must be one of warm, cool, but is 'hot'"),
        ("phase", {}, "phase.kind is required but not set"),
        ("phases", [{"kind": "cool", "ratio": 2.0}], "phases.0.ratio must be at most 1.0"),
        ("kinds", ["a", "c"], "kinds.1 must be one of a, b, but is 'c'"),
        ("kinds", "c", "kinds must be a list or all, but is 'c'"),
        ("inner", [], "inner must be a whole number or a number or text, but is []"),
    ],
)  # fmt: skip
def test_unions_and_nested_models(key: str, value: Any, text: str) -> None:
    values = put({}, key, value)
    found = problems(Everything, values)
    check(found, values)
    assert text in found
    assert len(found.splitlines()) == (2 if key == "stage.nam" else 1), found


def test_a_refused_mapping_is_not_printed() -> None:
    values = {"mirror": {"url": "s3://x", "options": {"secret": "abc"}}}
    model = config_class(find_task("digits", "test"))
    values = put({"task": {"use": "digits"}}, "checkpoint", values)
    lines = problems(model, values).splitlines()
    line = next(line for line in lines if "secret" in line)
    assert line.startswith("checkpoint.mirror.options must be without 'secret'")
    assert "abc" not in line


@pytest.mark.slow
def test_generated_types() -> None:
    """Fields of random types with random values: keys never contain the tag of a union member."""
    draw = random.Random(5)
    refused = 0
    for _ in range(75):
        kind = _any_type(draw, 3)
        model = create_model("Generated", __base__=Section, field=(kind, ...))
        for _ in range(25):
            values = {"field": _any_value(draw, 3)}
            text = problems(model, values)
            check(text, values)
            refused += bool(text)
    assert refused > 1000


def _any_type(draw: random.Random, depth: int) -> Any:
    plain: list[Any] = [int, float, str, bool, Even, Wrapped, Stage, Phase, Literal["a", "b"]]
    plain += [Annotated[int, Field(ge=1, le=5)], Annotated[str, Field(min_length=2)]]
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(plain)
    one, two = _any_type(draw, depth - 1), _any_type(draw, depth - 1)
    kinds = [one | None, one | two, list[one], dict[str, one], dict[int, one]]
    return draw.choice([*kinds, Annotated[one | two, AfterValidator(_even)] | None])


def _any_value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(6 if depth else 3)
    if kind == 3:
        return [_any_value(draw, depth - 1) for _ in range(draw.randrange(3))]
    if kind == 4:
        return {"name": _any_value(draw, depth - 1), "steps": 2}
    if kind == 5:
        names = draw.sample(["kind", "name", "steps", "a", "7"], draw.randrange(3))
        return {name: _any_value(draw, depth - 1) for name in names}
    return draw.choice([None, True, 0, 3, -2, 0.5, "a", "warm", "zzz", ""])
