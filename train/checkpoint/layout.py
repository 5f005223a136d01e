"""Names and digests that a checkpoint has on disk and in a mirror."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_STEP_NAME = re.compile(r"step-([0-9]{12})")


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint: ``step-`` and 12 digits."""
    return f"step-{step:012d}"


def parse_step_name(name: str) -> int | None:
    """The step of a checkpoint's directory name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def json_sha256(body: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a JSON object with its keys sorted."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def dumps_with_sha256(body: Mapping[str, Any]) -> str:
    """A JSON object as text, with the SHA-256 of the other keys as its last key ``sha256``."""
    return json.dumps({**body, "sha256": json_sha256(body)}, indent=1)
