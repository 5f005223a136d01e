"""Checks the fields of JSON that another process has written, perhaps incompletely or as another
version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

Fields = Mapping[str, type | tuple[type, ...]]


def has_fields(values: object, fields: Fields) -> TypeGuard[dict[str, Any]]:
    """Whether the value is a JSON object with all of these fields, each of its type."""
    return isinstance(values, dict) and all(
        name in values and isinstance(values[name], kind) for name, kind in fields.items()
    )
