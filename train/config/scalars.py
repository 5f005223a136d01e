"""Finds the value of a YAML text that cannot be read as the type that its form or tag gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from train.config.leaves import leaves

_LONGEST = 60
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_MOST_BITS = 1024
"""Larger numbers are infinite as a float, and Python refuses to print the largest."""


def refuse_large_numbers(values: Any) -> None:
    """Raises OverflowError for a whole number, also as a key, that is too large for a float."""
    for path, value in leaves(values):
        for number in (*path, value):
            if isinstance(number, int) and number.bit_length() > _MOST_BITS:
                raise OverflowError(f"a number has more than {_MOST_BITS} bits")


def misleading(text: str) -> tuple[int, str] | None:
    """The line, from 1, and the fault of the first number that YAML does not read as the decimal
    that it looks like: 010 is 8 to it, and 1:30 is 90. None without one."""
    for scalar in _scalars(yaml.compose(text, Loader=yaml.SafeLoader)):
        if scalar.style or not str(scalar.tag).endswith((":int", ":float")):
            continue
        read: Any = yaml.SafeLoader("").construct_object(scalar)
        line, written = scalar.start_mark.line + 1, scalar.value
        if ":" in written:
            return line, (
                f"has {written}, which YAML reads as the number {read} (base 60); write {read}, or "
                "quote it to make it a text"
            )
        if _OCTAL.fullmatch(written) and read != int(written):
            return line, (
                f"has {written}, which YAML reads as the octal number {read}; write it without the "
                "leading 0, or quote it to make it a text"
            )
    return None


def unreadable(text: str) -> tuple[int, str]:
    """The line, from 1, and the fault of the first scalar that PyYAML cannot convert, as the end of
    a sentence."""
    loader = yaml.SafeLoader("")
    for scalar in _scalars(yaml.compose(text, Loader=yaml.SafeLoader)):
        try:
            refuse_large_numbers(loader.construct_object(scalar))
        except Exception:
            shown = repr(scalar.value)
            if len(shown) > _LONGEST:
                shown = f"{shown[:_LONGEST]}... ({len(scalar.value)} characters)"
            kind = str(scalar.tag).rpartition(":")[2]
            return scalar.start_mark.line + 1, f"has {shown}, which cannot be read as YAML's {kind}"
    return 1, "has a value that cannot be read as the type of its YAML tag"


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for item in pair:
                yield from _scalars(item)
