"""The processor cores of this machine that the process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """By CPU affinity on Linux; all cores on other systems."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
