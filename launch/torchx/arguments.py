"""Checks the arguments of isorun's components in calls from Python."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError

if TYPE_CHECKING:
    from torchx.specs import AppDef

_WRITTEN: dict[Any, str] = {
    str: "a text", int: "a whole number", bool: "True or False",
    list: "a list of texts, such as ['a', 'b']", dict: "a dict of texts, such as {'A': 'b'}",
}  # fmt: skip


def check_types(function: Callable[..., AppDef], given: Mapping[str, Any]) -> None:
    """Checks the arguments of a call from Python, such as ``config='a.yaml'``, which would be a
    list of letters. Raises UsageError."""
    for name, annotation in typing.get_type_hints(function).items():
        if name == "return":
            continue
        values = given[name] if isinstance(given[name], tuple) else (given[name],)  # *overrides
        for value in values:
            if not _fits(value, annotation):
                options = [_plain(option) for option in _options(annotation)]
                expected = " or ".join(_WRITTEN.get(option, "None") for option in options)
                raise UsageError(
                    f"{name} must be {expected}, but is {value!r} (argument of "
                    f"isorun.{function.__name__})."
                )


def _fits(value: object, annotation: Any) -> bool:
    for option in _options(annotation):
        inner = typing.get_args(option)
        if not isinstance(value, _plain(option)) or (isinstance(value, bool) and option is int):
            continue
        if isinstance(value, list) and not all(isinstance(v, str) for v in value):
            continue
        if isinstance(value, dict) and inner:
            texts = (*value.keys(), *value.values())
            if not all(isinstance(text, str) for text in texts):
                continue
        return True
    return False


def _options(annotation: Any) -> tuple[Any, ...]:
    is_optional = typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if is_optional else (annotation,)


def _plain(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation
