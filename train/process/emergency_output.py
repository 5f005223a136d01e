"""Output that must not fail, whoever reads it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def write_stderr(text: str) -> None:
    """Writes a line to standard error with one ``write`` call, without Python's buffers and locks:
    for signal handlers, and for threads that end the process.

    Never raises: the reader of a pipe may have ended by the same signal.
    """
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\nisorun: {text}\n".encode())


def silence(stream: TextIO) -> None:
    """Redirects a stream to /dev/null; otherwise the interpreter's flush at exit fails."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
