"""The newest and the best values of metrics.jsonl, read from its end within a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.files import lines_backwards
from train.json_files import is_count, is_number, parse_object

LIMIT = 16 << 20
"""Bytes of metrics.jsonl that are read, from its end."""
TRAINING_LOSS = "train/loss"


@dataclass(frozen=True)
class Value:
    """A metric at a step."""

    metric: str
    value: float
    step: int


@dataclass
class Tail:
    """What the end of metrics.jsonl has."""

    row: dict[str, Any] | None = None
    """The last row."""
    newest: dict[str, Value] = field(default_factory=dict)
    """The last value of each metric asked for."""
    best: Value | None = None
    """The best value of the first metric."""
    complete: bool = True
    """Whether the whole file was read."""


def read_tail(path: Path, metric: str, mode: str, limit: int = LIMIT) -> Tail:
    """Reads the last ``limit`` bytes: the newest value and the best (``mode``: min or max) of a
    metric, and the newest loss of the training. Raises OSError."""
    tail = Tail()
    if not path.exists():
        return tail
    wanted = {name: f'"{name}"'.encode() for name in (metric, TRAINING_LOSS)}
    sign = -1.0 if mode == "max" else 1.0
    seen = 0
    for line in lines_backwards(path):
        seen += len(line) + 1
        if seen > limit + 1:
            tail.complete = False
            break
        if tail.row is not None and not any(key in line for key in wanted.values()):
            continue
        row = _row(line)
        if row is None:
            continue
        tail.row = tail.row or row
        for name in list(wanted):
            value = row.get(name)
            if name not in row or not (value is None or is_number(value)):
                continue
            found = Value(name, math.nan if value is None else float(value), row["step"])
            tail.newest.setdefault(name, found)
            if name != metric:
                del wanted[name]  # its newest value is enough
            elif math.isfinite(found.value) and (
                tail.best is None or sign * found.value <= sign * tail.best.value
            ):
                tail.best = found  # of equal values the first
    return tail


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None for one that is damaged or still being written."""
    try:
        row = parse_object(line)
    except ValueError:
        return None
    return row if is_count(row.get("step")) else None
