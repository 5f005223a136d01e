"""Durable file writes: after a crash a file has its old content or its new content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_bytes(file: FileIO, data: bytes, *, durable: bool) -> None:
    """Appends all of ``data`` to an unbuffered file, and fsyncs it if ``durable``.

    On an OSError the file keeps its old content.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):  # an unbuffered file may write less than asked
            written += file.write(data[written:])
        if durable:
            os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


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
