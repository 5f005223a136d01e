"""The fingerprint of a dataset as checkpoints store it: a list of name, exact, values."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from train.json_files import is_number

Parts = dict[str, tuple[str, tuple[float, ...]]]
"""By name: what must be equal on any machine, and some values that may be rounded differently."""


def parts(stored: Any) -> Parts | None:
    """The parts of a fingerprint; None for what is not one."""
    if not isinstance(stored, list) or not stored:
        return None
    found: Parts = {}
    for part in stored:
        match part:
            case [str(name), str(exact), list(values)]:
                found[name] = exact, tuple(float(v) if is_number(v) else math.nan for v in values)
            case _:
                return None
    return found


def digest(stored: Any) -> str | None:
    """A short digest; None for what is no fingerprint. Of the values two digits count, so that
    machines which round differently have the same one."""
    found = parts(stored)
    if found is None:
        return None
    rounded = [[name, exact, [f"{v:.1e}" for v in values]]
               for name, (exact, values) in found.items()]  # fmt: skip
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]
