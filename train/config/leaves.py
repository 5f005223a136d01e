"""The values in nested mappings and lists, with the keys and indices that lead to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Path = tuple[Any, ...]
"""Keys of mappings, which may contain dots, and indices of lists."""


def leaves(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All values that are no mapping and no list."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from leaves(value, (*path, name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from leaves(value, (*path, index))
    else:
        yield path, values


def value_at(values: Any, path: Path) -> Any:
    """The value at a path, possibly a container; None without one."""
    for part in path:
        try:
            values = values[part]
        except (LookupError, TypeError):
            return None
    return values


def key_path(path: Path) -> tuple[str, ...]:
    """The same without indices: a list is set as a whole."""
    return tuple(str(part) for part in path if type(part) is not int)


def shown_path(path: Sequence[Any]) -> str:
    """The path for a message: ``section.key[0]``."""
    text = "".join(f"[{part}]" if type(part) is int else f".{part}" for part in path)
    return text.removeprefix(".")
