"""Turns pydantic's validation errors into one sentence each: key, value, origin, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from train.config.compose import Composed
from train.exits import UsageError
from train.suggest import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a config model accepts, sections included."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += known_keys(candidate, f"{prefix}{name}.")
    return keys


def explain(
    error: ValidationError, model: type[BaseModel], composed: Composed, prefix: str = ""
) -> UsageError:
    """All problems of a config, one sentence a line, each only once.

    ``prefix`` is where in the config the model stands, such as "task.".
    """
    keys = known_keys(model, prefix)
    problems: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        problems.setdefault(_key(item["loc"], keys, prefix), []).append(item)
    return UsageError(
        "\n".join(_sentence(key, items, keys, composed) for key, items in problems.items())
    )


def _key(location: Iterable[Any], keys: list[str], prefix: str) -> str:
    """The dotted key of an error's location, without the tags that pydantic adds for unions."""
    parts = [*prefix.rstrip(".").split("."), *(str(part) for part in location)]
    parts = [part for part in parts if part]
    key = ".".join(parts)
    while parts and key not in keys and ".".join(parts[:-1]) in keys and _is_tag(parts[-1]):
        parts = parts[:-1]
        key = ".".join(parts)
    return key


def _is_tag(part: str) -> bool:
    return part in ("int", "float", "str", "bool", "none") or "[" in part or part[:1].isupper()


def _sentence(key: str, items: list[Any], keys: list[str], composed: Composed) -> str:
    first = items[0]
    where = composed.where(key)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(key, keys)
        return f"{key} is not a known key (value {first['input']!r}, {where}){hint}"
    if first["type"] == "missing":
        return (
            f"{key} is required but set nowhere; set it in a config file or as {key}=... on the "
            "command line."
        )
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        said = str(first["ctx"]["error"]).rstrip(".")
        return f"{said} (the section {key or 'config'} is {where})."
    value = first["input"]
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    hint = "."
    choices = [c for item in items if item["type"] == "literal_error" for c in _choices(item)]
    if choices and isinstance(value, str):
        hint = did_you_mean(value, choices)
    return f"{key} must be {expected}, but is {value!r} ({where}){hint}"


def _expected(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]}"
    if kind == "literal_error":
        return f"one of {', '.join(_choices(item))}"
    if kind == "value_error":
        return str(context["error"]).rstrip(".")
    return str(item["msg"])[:1].lower() + str(item["msg"])[1:]


def _choices(item: Any) -> list[str]:
    return str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
