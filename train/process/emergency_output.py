"""What a process says when nothing may stop it from ending."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def write_stderr(text: str) -> None:
    """A line on standard error, straight to the kernel: from signal handlers and dying threads.
    Whoever reads it may have been stopped by the same Ctrl-C."""
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\nisorun: {text}\n".encode())
