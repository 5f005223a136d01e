"""Whether a run is in progress, and how it ended otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from train.exits import Exit
from train.files import open_regular, read_bytes

FRESH = 60.0
"""Seconds: a heartbeat that is older is that of a run which has ended. They are written at least
every 10 s."""


class State(NamedTuple):
    """The state of a run."""

    kind: str
    """finished, running, stopped, failed, ended (no end is recorded) or new (no attempt)."""
    text: str
    """The same in words."""
    reason: str = ""
    """Why the last attempt ended, where that is recorded."""
    code: int | None = None
    """The exit code of the last attempt."""


def find_state(
    directory: Path, attempts: Mapping[int, Mapping[str, Any]], *, is_finished: bool
) -> State:
    """The state of the run in a directory."""
    ended = attempts[max(attempts)].get("ended") if attempts else None
    end: Mapping[str, Any] = ended if isinstance(ended, Mapping) else {}
    code, reason = end.get("code"), str(end.get("reason") or "")[:2000]
    code = code if type(code) is int else None
    if is_finished:
        return State("finished", "finished", code=Exit.DONE)
    if code is None and is_in_progress(directory):
        return State("running", "in progress")
    if not attempts:
        return State("new", "no attempt is recorded")
    if code is None:
        return State("ended", "ended without a recorded exit: killed, or its machine was lost")
    if code in (Exit.PREEMPTED, Exit.STOPPED_AT_ONCE):
        return State("stopped", f"stopped on request (exit code {code})", reason, code)
    return State("failed", f"failed (exit code {code})", reason, code)


def is_in_progress(directory: Path) -> bool:
    """Whether a process trains in a run directory: it holds the lock on this machine, or has
    written a heartbeat lately.

    The lock is not tried, since a run that starts at that moment would be refused.
    """
    return _is_locked(directory / "lock") or _has_heartbeat(directory / "heartbeats")


def _is_locked(lock: Path) -> bool:
    try:
        if not read_bytes(lock, 4096):
            return False  # the process has released it
        descriptor = open_regular(lock)
        try:
            inode = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    held = (line.split() for line in locks.splitlines() if " FLOCK " in line)
    # With an overlay file system, the kernel names another device here than stat does.
    return any(words[5].rpartition(":")[2] == str(inode) for words in held if len(words) > 5)


def _has_heartbeat(folder: Path) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:
        return any(
            entry.name.startswith("rank-")
            and time.time() - entry.stat(follow_symlinks=False).st_mtime < FRESH
            for entry in entries
        )
    return False
