"""JSON that another process has written: perhaps incompletely, as another version, or to harm.

Its size is bounded before it is read, and its form is checked before it is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

from train.files import open_regular, read_bytes

Fields = Mapping[str, type | tuple[type, ...]]
"""The keys that an object must have, and the type or types of each value as JSON gives them."""

LIMIT = 64 << 20
"""The largest size, in bytes, of a file with one record."""
_DEEPEST = 400  # levels; Python's stack has 1000 frames
_CONTAINERS = (dict, list)
LARGEST = (1 << 62) - 1
"""The largest step or position: positions are 64-bit integers."""


def has_fields(values: object, fields: Fields) -> TypeGuard[dict[str, Any]]:
    """Whether the value is a JSON object with all of these fields, each of its type. ``true`` is
    not an integer."""
    return isinstance(values, dict) and all(
        name in values and type(values[name]) in (kind if isinstance(kind, tuple) else (kind,))
        for name, kind in fields.items()
    )


def is_count(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer from 0 to ``LARGEST``."""
    return type(value) is int and 0 <= value <= LARGEST


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that ``float`` takes. An integer of JSON may be larger."""
    is_within = type(value) is int and abs(value) <= sys.float_info.max
    return is_within or type(value) is float


def parse_json(data: bytes | str) -> Any:
    """The value of JSON text in UTF-8. Raises ValueError, for nesting that is too deep as well."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        values = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair cannot be printed or used in a path.
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    brackets = text.count("{") + text.count("[")  # at least the depth; metrics.jsonl has many rows
    if brackets > _DEEPEST and is_too_deep(values):
        raise ValueError("it is nested too deeply")
    return values


def is_too_deep(value: object) -> bool:
    """Whether a JSON value is nested so deeply that printing or storing it could fail."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        parts = [v.values() if isinstance(v, dict) else v for v in level if type(v) in _CONTAINERS]
        level = [part for values in parts for part in values if type(part) in _CONTAINERS]
        if not level:
            return False
    return True


def parse_object(data: bytes | str, fields: Fields | None = None) -> dict[str, Any]:
    """A JSON object with at least these fields. Raises ValueError, whose text names the fault."""
    values: dict[str, Any] = parse_json(data)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    for name, kind in (fields or {}).items():
        if name not in values:
            raise ValueError(f"it has no {name}")
        if not has_fields(values, {name: kind}):
            raise ValueError(f"its {name} is {shown(values[name])}")
    return values


def read_object(path: Path, fields: Fields | None = None, *, limit: int = LIMIT) -> dict[str, Any]:
    """``parse_object`` for a regular file of at most ``limit`` bytes. Raises OSError and
    ValueError."""
    return parse_object(read_bytes(path, limit), fields)


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a regular file with their objects; None for a line that has none, such as one
    that a crash cut off. Raises OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        yield from parsed_lines(file)


def parsed_lines(file: BufferedReader) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """``json_lines`` for an open file."""
    # A line that is too long comes in parts, none of which is an object.
    while line := file.readline(LIMIT):
        try:
            yield line, parse_object(line)
        except ValueError:
            yield line, None


def shown(value: object) -> str:
    """A JSON value for a message: short, whatever it is."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if type(value) is int and abs(value) > LARGEST:
        return "a number that is too large"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
