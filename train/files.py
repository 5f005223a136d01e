"""Durable file writes: after a crash a file has its old content or its new content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically and durably, through a temporary file beside it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """``replace_bytes`` for text, encoded as UTF-8."""
    replace_bytes(path, text.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``replace_bytes`` for a JSON object, indented by one space."""
    replace_text(path, json.dumps(values, indent=1) + "\n")
