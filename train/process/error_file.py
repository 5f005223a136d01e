"""Leaves an error where torchrun looks for it, so that it shows the first one of all ranks."""

from __future__ import annotations

import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

from train.exits import RunError


def write_error_file(error: BaseException) -> None:
    """Writes the file that torchrun names in TORCHELASTIC_ERROR_FILE, in its format: of all
    ranks that leave one, it shows the one with the earliest time as the root cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    told_in_words = isinstance(error, RunError)  # a user's mistake, say, needs no stack
    stack = str(error) if told_in_words else "".join(traceback.format_exception(error))
    told = {"timestamp": str(int(time.time())), "py_callstack": stack}
    text = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": told}}
    with suppress(OSError):  # torchrun then shows the exit code alone
        Path(path).write_text(json.dumps(text), encoding="utf-8")
