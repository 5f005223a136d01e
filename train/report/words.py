"""Times, time spans and placements in words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from train.json_files import is_count, is_number


def placement(attempt: Mapping[str, Any]) -> str:
    """Where an attempt ran, in a few words; empty where it does not say."""
    size, device = attempt.get("world_size"), attempt.get("device")
    if not is_count(size):
        return ""
    hosts = attempt.get("hosts")
    count = len(hosts) if isinstance(hosts, list) else 0
    strategy = str(attempt.get("strategy", ""))
    text = f"{size} × {device}"
    text += f" on {count} hosts" if count > 1 else ""
    return text if strategy in ("", "single") else f"{text}, {strategy}"


def duration(seconds: float) -> str:
    """A time span for people."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    if hours < 48:
        return f"{hours}:{rest // 60:02d} h" if hours else f"{rest // 60}:{rest % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(when: float | None) -> str:
    """A point in time for people, in the time zone of this machine."""
    if when is None or not is_number(when) or not 0 <= when < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
