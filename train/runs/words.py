"""Times and time spans in words."""

from __future__ import annotations

import time

from train.json_files import is_number


def duration(seconds: float) -> str:
    """A time span for people."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    if hours < 48:
        return f"{hours}:{rest // 60:02d} h" if hours else f"{rest // 60}:{rest % 60:02d} min"
    return f"{whole / 86400:.1f} d"


def clock(when: float | None) -> str:
    """A point in time for people, in the time zone of this machine."""
    if when is None or not is_number(when) or not 0 <= when < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
