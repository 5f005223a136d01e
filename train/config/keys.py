"""The keys of a config model: all of them, and which one a validation error is about.

pydantic reports where an error is as a path with parts of its own: a tag for each member of a
union (``constrained-int``, ``function-after[...]``, ``literal['auto']``, a class's name) and
``[key]``. The types of the model and the values that were given decide which parts are keys, so
the spelling of the tags does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, NewType, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a config model accepts, sections included."""
    return _keys(model, prefix, ())


def _keys(annotation: Any, prefix: str, above: tuple[Any, ...]) -> list[str]:
    keys = []
    for name, inner in (_fields(annotation) or {}).items():
        keys.append(prefix + name)
        for member in _sections(inner):
            if member not in above:  # a model may hold itself
                keys += _keys(member, f"{prefix}{name}.", (*above, member))
    return list(dict.fromkeys(keys))


def key_of(
    model: type[BaseModel], values: Any, location: Iterable[Any], *, unknown: bool = False
) -> str:
    """The dotted key of an error's ``location``: names of fields, keys of dictionaries and
    indices of lists.

    ``values``: what the model was given. ``unknown``: the last part is a name that no field has.
    """
    return ".".join(_walk(model, values, list(location), unknown))


def names_at(model: type[BaseModel], key: str) -> list[str]:
    """The names of the fields of the section, or the sections, at a dotted key."""
    found: list[Any] = [model]
    for part in key.split(".") if key else []:
        found = [inner for annotation in found for inner in _inside(annotation, part)]
    return [name for annotation in found for name in _fields(annotation) or {}]


def fields_at(model: type[BaseModel], key: str) -> dict[str, FieldInfo]:
    """The fields of the section at a dotted key; empty where that is no pydantic model."""
    found: list[Any] = [model]
    for part in key.split("."):
        found = [inner for annotation in found for inner in _inside(annotation, part)]
    models = [cls for cls in found if isinstance(cls, type) and issubclass(cls, BaseModel)]
    return dict(models[0].model_fields) if len(models) == 1 else {}


def _walk(annotation: Any, value: Any, location: list[Any], unknown: bool) -> list[str]:
    """The parts of a location that are keys."""
    if not location:
        return []
    members = _members(annotation)
    if len(members) > 1:  # the first part says in which of them the error is
        return max((_walk(member, value, location[1:], unknown) for member in members), key=len)
    part, *rest = location
    given, inside = _given(value, part)
    fields = _fields(members[0])
    if fields is not None:
        if part in fields:
            return [part, *_walk(fields[part], inside, rest, unknown)]
        return [str(part)] if given and unknown and not rest else []
    item = _item(members[0], part)
    if item is None or not given:
        return []
    return [str(part)] if rest == ["[key]"] else [str(part), *_walk(item, inside, rest, unknown)]


def _given(value: Any, part: Any) -> tuple[bool, Any]:
    """Whether there is a value at a key or an index, and which."""
    if isinstance(value, Mapping) and part in value:
        return True, value[part]
    if isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
        return True, value[part]
    return False, None


def _inside(annotation: Any, part: str) -> list[Any]:
    """The sections that a key of ``annotation`` may hold."""
    fields = _fields(annotation)
    if fields is not None:
        return _sections(fields[part]) if part in fields else []
    item = _item(annotation, int(part) if part.isdecimal() else part)
    return [] if item is None else _sections(item)


def _sections(annotation: Any) -> list[Any]:
    """The members of a type, those of unions in it one by one."""
    members = _members(annotation)
    if len(members) == 1:
        return members
    return [inner for member in members for inner in _sections(member)]


def _members(annotation: Any) -> list[Any]:
    """What a value may be beside null: several types for a union, else one."""
    while True:
        origin = get_origin(annotation)
        if hasattr(annotation, "__value__"):  # ``type Name = ...``
            annotation = annotation.__value__
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not NoneType]
            if len(members) > 1:
                return members
            annotation = members[0]
        else:
            return [annotation]


def _fields(annotation: Any) -> dict[str, Any] | None:
    """The fields of a type that has named ones, with their types."""
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, BaseModel):
        return {name: info.annotation for name, info in annotation.model_fields.items()}
    is_typed_dict = hasattr(annotation, "__required_keys__")
    if is_typed_dict or dataclasses.is_dataclass(annotation):
        return get_type_hints(annotation)
    return None


def _item(annotation: Any, part: Any) -> Any:
    """The type of the items of a list or of the values of a dictionary; None for neither."""
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if not isinstance(kind, type) or issubclass(kind, str | bytes):
        return None
    if issubclass(kind, Mapping):
        return arguments[1] if len(arguments) == 2 else Any
    if not issubclass(kind, Collection) or not isinstance(part, int):
        return None
    if issubclass(kind, tuple) and Ellipsis not in arguments:
        return arguments[part] if part < len(arguments) else Any
    return arguments[0] if arguments else Any
