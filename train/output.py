"""Lines for people, from any part of the project."""

from __future__ import annotations

import sys
from contextlib import suppress

from train.secrets import redact
from train.visible import visible


def log(text: str) -> None:
    """Prints a line for people on standard error, without secrets and with control characters as
    escapes. The command goes on if that fails."""
    with suppress(OSError):
        print(f"isorun: {visible(redact(text))}", file=sys.stderr, flush=True)
