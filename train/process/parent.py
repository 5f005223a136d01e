"""Ends a process with the one that has started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals, is_alive: Callable[[], bool]) -> None:
    """Has the kernel send this process a signal when the thread that has started it ends, also by
    SIGKILL. ``is_alive`` says whether the parent still lives. Only Linux can do this; on other
    systems nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if not is_alive():  # it died before prctl took effect
        os.kill(os.getpid(), number)
