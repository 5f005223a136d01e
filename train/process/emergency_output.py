"""Output from signal handlers and from threads that end the process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def write_stderr(text: str) -> None:
    """Writes a line to standard error with one ``write`` call, without Python's buffers and locks.

    Never raises: the reader of a pipe may have ended by the same signal.
    """
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\nisorun: {text}\n".encode())
