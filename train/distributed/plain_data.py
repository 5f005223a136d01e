"""Values of plain data as JSON and back, with their types.

Plain data is None, bool, int, float, str, and lists, tuples and dicts of plain data; the keys of a
dict are of any of these types but list and dict. A value of a subclass, such as an enum member or
a number of NumPy, comes back as one of the type itself. Reading it runs no code, unlike a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from train.exits import RetryError

_ATOMS: list[tuple[type, Callable[[Any], Any]]] = [
    (Integral, int),
    (Real, float),
    (str, str.__str__),
]


def encode(value: Any) -> bytes:
    """The value as JSON. Raises TypeError for a value that is not plain data."""
    return json.dumps(_tagged(value), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """The value that ``encode`` was called with. Raises RetryError for other data."""
    try:
        return _value(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        raise RetryError(
            "A message of another rank has a wrong format. Check that no other program reaches the "
            "ports of the ranks (docs/security.md), then rerun."
        ) from None


# A list is [items...], and others are objects with one key, which JSON has no types for.
def _tagged(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _ATOMS:
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is not plain data")


def _value(tagged: Any) -> Any:
    if isinstance(tagged, list):
        return [_value(item) for item in tagged]
    if isinstance(tagged, dict):
        match tagged:
            case {"tuple": [*items]}:
                return tuple(_value(item) for item in items)
            case {"dict": [*pairs]}:
                return {_value(key): _value(item) for key, item in pairs}
        raise ValueError("unknown tag")
    return tagged
