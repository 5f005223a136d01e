"""Text in columns: complete where it is read by a program, fitted to the width of a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from unicodedata import combining, east_asian_width

from train.visible import visible

_GAP = "  "
_NARROWEST = 8
"""Columns are not made narrower than this."""


def terminal_width() -> int | None:
    """The width of the terminal that standard output is; None if it is none."""
    try:
        if not sys.stdout.isatty():
            return None
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def drawn(rows: Sequence[Sequence[str]], width: int | None, *, indent: str = "") -> list[str]:
    """The lines of a table, all columns left-aligned. Cells of the widest columns are cut where the
    lines are wider than ``width``."""
    cells = [[_in_a_line(cell) for cell in row] for row in rows]
    widths = [max(map(_length, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        _narrow(widths, width - len(indent) - len(_GAP) * (len(widths) - 1))
    lines = []
    for row in cells:
        fitted = (_padded(_cut(cell, size), size) for cell, size in zip(row, widths, strict=True))
        lines.append((indent + _GAP.join(fitted)).rstrip())
    return lines


def _in_a_line(text: str) -> str:
    """The text as a terminal can show it; the name of a directory may have any bytes."""
    plain = visible(text).replace("\n", " ").replace("\t", " ")
    return plain.encode("utf-8", "backslashreplace").decode()


def _narrow(widths: list[int], total: int) -> None:
    while sum(widths) > total and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1


def _cut(text: str, size: int) -> str:
    """The text without its middle, if it is longer than ``size``."""
    if _length(text) <= size:
        return text
    end = size // 2
    start = size - 1 - end
    while _length(text[:start]) + 1 + _length(text[-end:]) > size and start > 0:
        start -= 1
    return f"{text[:start]}…{text[-end:]}"


def _padded(text: str, size: int) -> str:
    return text + " " * (size - _length(text))


def _length(text: str) -> int:
    """Columns of a terminal."""
    if text.isascii():
        return len(text)
    return sum((1 + (east_asian_width(c) in "WF")) * (not combining(c)) for c in text)
