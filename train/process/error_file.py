"""Writes the error file that torchrun reads to report the first failure of all ranks."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from train.exits import RunError, message_of, traceback_of
from train.secrets import redact


def write_error_file(error: BaseException) -> None:
    """Writes the file named by TORCHELASTIC_ERROR_FILE, in torchrun's format.

    torchrun reports the rank with the earliest timestamp as the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    is_user_error = isinstance(error, RunError)  # needs no stack trace
    stack = str(error) if is_user_error else traceback_of(error)
    extra = {"timestamp": str(int(time.time())), "py_callstack": redact(stack)}
    message = redact(f"{type(error).__name__}: {message_of(error)}")
    text = {"message": {"message": message, "extraInfo": extra}}
    with suppress(OSError):  # torchrun then reports the exit code only
        Path(path).write_text(json.dumps(text), encoding="utf-8")
