"""Whether a run is in progress, and how its last attempt ended, from the files of its directory.

The lock itself is not tried: a run that starts at the same moment would be refused. Its file says
which process holds it, and is empty after a release.
"""

from __future__ import annotations

import math
import re
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.run_directory import RunDirectory
from train.exits import AGENT_RANK, Exit
from train.files import read_bytes
from train.json_files import is_number, read_object

STATES = {
    "new": "no attempt has got as far as training",
    "running": "a process trains",
    "hung": "a rank no longer sends heartbeats, or the watchdog ended the run",
    "stopped": "stopped on request; the same command resumes it",
    "finished": "complete",
    "failed": "ended with an error",
    "dead": "no process trains, and no end is recorded: killed, or its machine was lost",
    "unreadable": "the files of the run are damaged, or not of a run",
}
"""The states of a run, and their meaning."""

_HOLDER = re.compile(r"process (\d{1,9}) on (\S+) since ")
_LATEST = 1 << 36
"""Seconds since the epoch; the calendar has no year for much larger numbers."""
_SILENT = 600.0
"""Seconds after which a run without heartbeats counts as dead, if its process is out of sight."""
_FAILURES = 100
"""The most records of node agents that are read."""
_LAST_BEAT = 2.0
"""Seconds after the recorded end in which the process may still send a heartbeat."""
_SLOWEST = 10.0
"""The longest interval of the watchdog's heartbeats, in seconds."""


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    code: int
    name: str
    """The name of the exit code, or of the signal; empty for others."""
    reason: str
    time: float | None = None
    """When, in seconds since the epoch; None where it is unknown."""


@dataclass(frozen=True)
class Condition:
    """The state of a run now."""

    state: str
    """One of ``STATES``."""
    end: End | None
    """That of the last attempt, or, while a run is in progress, of the attempt before; None where
    none is known."""
    last_sign: float | None
    """When the run last wrote something, in seconds since the epoch."""


def condition(
    directory: RunDirectory,
    config: Mapping[str, Any],
    attempts: Mapping[int, Mapping[str, Any]],
    finished: Mapping[str, Any] | None,
    last_row: Mapping[str, Any] | None,
    now: float | None = None,
) -> Condition:
    """The state of a run at ``now``, from what its files say; ``last_row`` is that of
    metrics.jsonl."""
    now = time.time() if now is None else now
    number = max(attempts, default=0)
    last = attempts.get(number, {})
    locked, holder = _holder(directory.path / "lock")
    ended: Any = last.get("ended")
    ended = ended if isinstance(ended, Mapping) else {}
    since = max(locked - 1, (moment(ended.get("time")) or 0.0) + _LAST_BEAT)
    beats = [beat for beat in _heartbeats(directory.path) if beat >= since]
    times = [last.get("time"), ended.get("time"), (finished or {}).get("time")]
    times += [(last_row or {}).get("time"), *beats, locked if holder else None]
    last_sign = max(filter(None, map(moment, times)), default=None)
    if finished is not None:
        return Condition("finished", _end_of(last), last_sign)
    # A run that has recorded its end may still wait for a tracker.
    last_beat = None if ended else last_sign
    if holder and _is_alive(holder, locked, beats, config, last_beat, now):
        late = max(60.0, 6 * _interval(config))
        hung = any(now - beat > late for beat in beats)
        before = attempts.get(number - 1, {}) if not ended else last
        return Condition("hung" if hung else "running", _end_of(before), last_sign)
    if not attempts:
        return Condition("new", None, last_sign)
    end = ends_of(directory.path, {number: last}).get(number)
    if _hang(directory.path, number):
        return Condition("hung", end, last_sign)
    if end is None:  # version 0.1.0 recorded no ends
        asked = any((directory.path / name).exists() for name in ("stop", "stopped.json"))
        return Condition("stopped" if asked and not holder else "dead", None, last_sign)
    return Condition(_state_after(end.code), end, last_sign)


def described_end(path: Path, number: int, attempt: Mapping[str, Any]) -> str:
    """How an attempt of a run directory ended, to end a sentence with: what it recorded itself, the
    report of its watchdog, or the record of the node agent."""
    ended = ends_of(path, {number: attempt}).get(number)
    if ended is None:
        return "no recorded end: it was killed, lost its machine, or is in progress"
    if _hang(path, number) == ended.reason:
        return f"the watchdog ended it: {ended.reason}"
    return f"exit code {ended.code}: {ended.reason}"


def ends_of(path: Path, attempts: Mapping[int, Mapping[str, Any]]) -> dict[int, End]:
    """How attempts of a run directory ended, by number: what each recorded itself, or the report of
    its watchdog, or the record of the node agent. Without those of which nothing is known."""
    found: dict[int, End] = {}
    failures = None
    for number, attempt in attempts.items():
        end = _end_of(attempt)
        if end is None:
            failures = _recorded_failures(path) if failures is None else failures
            since = moment(attempt.get("time")) or 0.0
            until = moment(attempts.get(number + 1, {}).get("time")) or math.inf
            end = next((each for each in failures if since <= (each.time or 0.0) < until), None)
        # The main thread, too, may have seen that other ranks were ended.
        if (end is None or end.code == Exit.RETRY) and (hang := _hang(path, number)):
            end = End(Exit.RETRY, Exit.RETRY.name, hang, end.time if end else None)
        if end:
            found[number] = end
    return found


def _hang(path: Path, number: int) -> str:
    """The first line of the watchdog's report about an attempt; empty without one."""
    folder = path / "hangs"
    if folder.is_symlink() or (folder / f"attempt-{number}").is_symlink():
        return ""
    return _first_line(folder / f"attempt-{number}" / "report.txt")


def moment(value: object) -> float | None:
    """A time of a file in seconds since the epoch; None for what cannot be one."""
    return float(value) if is_number(value) and 0 <= value < _LATEST else None


def exit_name(code: int) -> str:
    """The name of an exit code of isorun or of a signal; empty for others."""
    if code in set(Exit):
        return Exit(code).name
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else ""


def _state_after(code: int) -> str:
    if code == Exit.DONE:
        return "finished"
    return "stopped" if code in (Exit.PREEMPTED, Exit.STOPPED_AT_ONCE) else "failed"


def _end_of(attempt: Mapping[str, Any]) -> End | None:
    ended = attempt.get("ended")
    if not isinstance(ended, Mapping) or type(ended.get("code")) is not int:
        return None
    code, reason = ended["code"], str(ended.get("reason") or "")
    return End(code, exit_name(code), reason, moment(ended.get("time")))


def _recorded_failures(path: Path) -> list[End]:
    """The records of node agents, the newest first."""
    folder, found = path / "failures", []
    if folder.is_symlink():
        return []
    for file in sorted(folder.glob("*.json"), reverse=True)[:_FAILURES]:
        with suppress(OSError, ValueError):
            record = read_object(
                file, {"time": (int, float), "exit_code": int, "what": str}, limit=1 << 20
            )
            code, first = record["exit_code"], record.get("first")
            if isinstance(first, dict) and first.get("rank") == AGENT_RANK:
                continue  # there was no attempt
            found.append(End(code, exit_name(code), record["what"], moment(record["time"])))
    return found


def _first_line(path: Path) -> str:
    with suppress(OSError):
        return read_bytes(path, 1 << 26).decode(errors="replace").strip().partition("\n")[0]
    return ""


def _holder(lock: Path) -> tuple[float, tuple[int, str] | None]:
    """When the lock was taken, and the process and host that took it and have not released it."""
    with suppress(OSError):
        text = read_bytes(lock, 1 << 12).decode(errors="replace")
        if match := _HOLDER.match(text):
            return lock.stat().st_mtime, (int(match[1]), match[2])
    return 0.0, None


def _heartbeats(path: Path) -> list[float]:
    """The times of all heartbeat files."""
    folder, found = path / "heartbeats", []
    if not folder.is_symlink():
        for file in folder.glob("rank-*.json"):
            with suppress(OSError):
                found.append(file.lstat().st_mtime)
    return found


def _interval(config: Mapping[str, Any]) -> float:
    """The interval of the heartbeats in seconds, at most that of the watchdog."""
    watchdog = config.get("watchdog")
    limits = watchdog.values() if isinstance(watchdog, Mapping) else ()
    numbers = [limit for limit in limits if is_number(limit) and limit > 0]
    return min(_SLOWEST, min(numbers, default=_SLOWEST * 10) / 10)


def _is_alive(
    holder: tuple[int, str],
    locked: float,
    beats: Sequence[float],
    config: Mapping[str, Any],
    last_sign: float | None,
    now: float,
) -> bool:
    """Whether the process that took the lock still runs, here or on another machine."""
    pid, host = holder
    here = host == socket.gethostname()
    if here and _runs_since(pid, locked):
        return True
    if beats:  # also of a container with the name of this machine, whose processes it does not see
        return now - max(beats) < max(5.0, 3 * _interval(config))
    return not here and now - (last_sign or 0.0) < _SILENT


def _runs_since(pid: int, taken: float) -> bool:
    """Whether a process with this id has run since before ``taken``: not one that got the id of an
    earlier one."""
    import psutil

    try:
        process = psutil.Process(pid)
        started: float = process.create_time()
        return started <= taken + 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False
