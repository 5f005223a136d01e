"""Turns pydantic's validation errors into one sentence each: key, value, origin, what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from train.config.compose import Composed
from train.config.keys import fields_at, key_of, known_keys, names_at
from train.exits import UsageError
from train.suggest import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
    "none_required": "null",
}
"""What a value of another type should have been."""

_BOUNDS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
    "string_pattern_mismatch": ("pattern", "text that matches '{}'"),
    "string_too_short": ("min_length", "text of at least {} characters"),
    "string_too_long": ("max_length", "text of at most {} characters"),
    "too_short": ("min_length", "a list of at least {} items"),
    "too_long": ("max_length", "a list of at most {} items"),
}
_CHOICES = ("literal_error", "enum")
_LONGEST_VALUE = 200
_TO_SET = {"task": ["task.use"], "length": ["length.steps", "length.epochs"]}
"""What to set in required sections without a required field of their own."""


def explain(
    error: ValidationError, model: type[BaseModel], composed: Composed, prefix: str = ""
) -> UsageError:
    """All problems of a config, one sentence a line, one line a key.

    ``prefix`` is where in the config the model stands, such as "task.".
    """
    values: Any = composed.values
    for part in filter(None, prefix.split(".")):
        values = values.get(part) if isinstance(values, Mapping) else None
    problems: dict[str, list[Any]] = {}
    for item in map(_of_its_key, error.errors(include_url=False)):
        unknown = item["type"] == "extra_forbidden"
        key = key_of(model, values, item["loc"], unknown=unknown)
        problems.setdefault(key, []).append(item)
    return UsageError(
        "\n".join(
            _sentence(key, items, model, composed, prefix)
            for key, items in problems.items()
            if not _has_right_type(key, items, problems)
        )
    )


def _of_its_key(item: Any) -> Any:
    """The same error; one about the key that selects a union's member as one of that key."""
    if not item["type"].startswith("union_tag_"):
        return item
    context = item["ctx"]
    # As the location of an error in a member: the union's tag, then the key.
    name = context["discriminator"].strip("'")
    item = {**item, "loc": (*item["loc"], "tag", name), "type": "missing"}
    if "tag" in context:
        item |= {"type": "literal_error", "ctx": {"expected": context["expected_tags"]}}
        item["input"] = item["input"].get(name, context["tag"])
    return item


def _has_right_type(key: str, items: list[Any], problems: Mapping[str, Any]) -> bool:
    """Whether these are only about other types of a union than the one that the value has: then
    what is wrong is further inside."""
    inside = any(other.startswith(f"{key}.") for other in problems)
    return inside and all(item["type"] in (*_EXPECTED, *_CHOICES) for item in items)


# What other trainers call these settings.
_OTHER_NAMES = {
    "batch_size": "batch.global_batch_size",
    "train_batch_size": "batch.global_batch_size",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "epochs": "length.epochs",
    "max_epochs": "length.epochs",
    "num_train_epochs": "length.epochs",
    "grad_clip": "optim.clip_norm",
    "gradient_clip_val": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "learning_rate": "optim.lr",
    "log_every_n_steps": "track.log_every_steps",
    "logging_steps": "track.log_every_steps",
    "max_steps": "length.steps",
    "mixed_precision": "precision",
    "num_workers": "loader.workers",
    "optimizer": "optim.use",
    "output_dir": "run.dir",
    "save_steps": "checkpoint.every_steps",
    "val_check_interval": "evaluate.every_steps",
}


def _sentence(
    key: str, items: list[Any], model: type[BaseModel], composed: Composed, prefix: str
) -> str:
    full = (prefix + key).rstrip(".")
    where = composed.where(full)
    # In a union some members may know a key that others do not, or accept the type of a key.
    items = [item for item in items if item["type"] != "extra_forbidden"] or items
    items = [item for item in items if item["loc"][-1:] != ("[key]",)] or items
    first, value = items[0], _shown(items[0]["input"])
    if first["type"] == "extra_forbidden":
        hint = _hint_of_unknown(full, key, str(first["loc"][-1]), model, prefix)
        return f"{full} is not a known key (value {value}, {where}){hint}"
    if first["type"] == "missing":
        return _missing(full, model, key, composed)
    expected = " or ".join(dict.fromkeys(map(_expected, _merge_choices(items))))
    if first["loc"][-1:] == ("[key]",):
        return f"{full} has a key that must be {expected}, but is {value} ({where})."
    if first["type"] in ("value_error", "assertion_error") and isinstance(first["input"], Mapping):
        if names_at(model, key):
            text = expected if expected.startswith(full) else f"{full}: {expected}"
            given = [f"{full}.{name}" for name in first["input"]]
            origins = ", ".join(f"{name} {composed.where(name)}" for name in given)
            if not full or not 0 < len(given) < 4:
                origins = f"the section {full or 'config'} is {where}"
            return f"{text} ({origins})."
        return f"{full} must be {expected} ({where})."  # not the value, which may be a secret
    choices = [c for item in items if item["type"] in _CHOICES for c in _choices(item)]
    text_given = isinstance(first["input"], str)
    hint = did_you_mean(first["input"], choices) if choices and text_given else "."
    if first["type"] == "model_type" and text_given and "use" in names_at(model, key):
        hint = f"; did you mean {full}.use={first['input']}?"
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        hint = "; quote it to make it a text" + hint
    return f"{full} must be {expected}, but is {value} ({where}){hint}"


def _hint_of_unknown(full: str, key: str, written: str, model: type[BaseModel], prefix: str) -> str:
    """The end of the sentence about an unknown key, of which the file has ``written`` the last
    part."""
    *sections, last = written.split(".")
    if sections:  # a dotted key of a file
        return f"; write it nested, as {': {'.join(sections)}: {{{last}: ...{'}' * len(sections)}."
    section = key.rpartition(".")[0]
    names, known = names_at(model, section) if section else [], known_keys(model, prefix)
    hint = did_you_mean(full, [*(f"{prefix}{section}.{name}" for name in names), *known])
    if hint == "." and (ours := _OTHER_NAMES.get(last)) in known:
        return f"; did you mean {ours}?"
    if hint == "." and names:
        return f"; the keys of {prefix}{section} are {', '.join(names)}."
    return hint


def _missing(full: str, model: type[BaseModel], key: str, composed: Composed) -> str:
    if above := _list_above(composed.values, full):
        origin = composed.where(above)
        return f"{full} is required but not set; set it in the list {above} ({origin})."
    forms = " or ".join(f"{name}=..." for name in _to_set(full, model, key))
    return (
        f"{full} is required but not set; set it in a config file or as {forms} on the "
        "command line."
    )


def _list_above(values: Any, key: str) -> str:
    """The dotted key of the innermost list that a key is in; empty without one. Overrides cannot
    set what is in a list."""
    found, parts = "", key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(values, list):
            found = ".".join(parts[:depth])
            values = values[int(part)] if part.isdecimal() and int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return found


def _to_set(full: str, model: type[BaseModel], key: str) -> list[str]:
    """The keys to set for a field that is missing: for a section, those that it requires."""
    if full in _TO_SET:
        return _TO_SET[full]
    required = [name for name, info in fields_at(model, key).items() if info.is_required()]
    return [f"{full}.{required[0]}"] if required else [full]


def _merge_choices(items: list[Any]) -> list[Any]:
    """The same errors, with the choices of all in the first that has any."""
    having = [item for item in items if item["type"] in _CHOICES]
    if len(having) < 2:
        return items
    expected = ", ".join(item["ctx"]["expected"] for item in having)
    merged = {**having[0], "ctx": {"expected": expected}}
    return [merged if item is having[0] else item for item in items if item not in having[1:]]


def _expected(item: Any) -> str:
    """What a value should have been, to stand after "must be"."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        text = words.format(context[name])
        return text.removesuffix("s") if text.endswith((" 1 characters", " 1 items")) else text
    if kind in _CHOICES:
        choices = _choices(item)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"]).rstrip(".")
    text = re.sub(r"^(Input|Value|\w+) should be ", "", str(item["msg"])).rstrip(".")
    return text[:1].lower() + text[1:]


def _choices(item: Any) -> list[str]:
    return str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
