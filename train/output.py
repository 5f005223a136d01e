"""Lines for people, from any part of the project."""

from __future__ import annotations

import sys
from contextlib import suppress


def log(text: str) -> None:
    """Prints a line for people on standard error. The command goes on if that fails."""
    with suppress(OSError):
        print(f"isorun: {text}", file=sys.stderr, flush=True)
