"""Marks on the time line: attempts, checkpoints, stops, and faults."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.run_view import Checkpoint
from train.exits import AGENT_RANK, Exit
from train.files import open_regular, refuse_link
from train.json_files import Fields, has_fields, is_count, read_object
from train.report.curves import Metrics
from train.report.state import State
from train.runs.state import End, moment

MARKS = 500
"""The most marks of a kind."""
_FILES = 100
_TEXT = 2000  # characters
_HANG = re.compile(r"attempt-(\d{1,9})")
_FAILURE: Fields = {"time": (int, float), "what": str, "first": dict}


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run."""

    kind: str
    """attempt, checkpoint, stop, fault, skipped or finish."""
    step: int
    time: float | None
    """Seconds since the epoch; None where it is unknown."""
    text: str
    attempt: int | None = None


def find_marks(
    directory: Path,
    attempts: Mapping[int, Mapping[str, Any]],
    ends: Mapping[int, End],
    metrics: Metrics,
    checkpoints: Sequence[Checkpoint],
    state: State,
) -> list[Mark]:
    """All marks of a run, by step and time."""
    clock = Clock(metrics)
    found = [*_of_attempts(attempts, ends, metrics, state)]
    found += [
        Mark("checkpoint", saved.step, clock.time(saved.step), f"Checkpoint of step {saved.step}")
        for saved in checkpoints[-MARKS:]
    ]
    found += [
        Mark("skipped", step, time, f"{count} step{'s' * (count > 1)} skipped: {why}")
        for step, time, count, why in metrics.skipped
    ]
    found += _hangs(directory, metrics, attempts)
    found += _failures(directory, clock)
    return sorted(found, key=lambda mark: (mark.step, mark.time or 0.0))


class Clock:
    """When a step was taken, by the rows of metrics.jsonl that are kept."""

    def __init__(self, metrics: Metrics) -> None:
        longest = max(metrics.curves.values(), key=lambda curve: curve.count, default=None)
        points = longest.points() if longest else []
        self._known = [(p.step, p.time) for p in points if p.time is not None]

    def time(self, step: int) -> float | None:
        """The time of the last row up to a step; None without one."""
        at = bisect_right(self._known, step, key=lambda pair: pair[0])
        return self._known[at - 1][1] if at else None

    def step(self, time: float) -> int:
        """The step of the last row before a time; 0 without one."""
        return max((s for s, t in self._known if t <= time), default=0)


def _of_attempts(
    attempts: Mapping[int, Mapping[str, Any]],
    ends: Mapping[int, End],
    metrics: Metrics,
    state: State,
) -> Iterator[Mark]:
    """The start and the end of each attempt."""
    newest = max(attempts, default=0)
    for number in sorted(attempts)[-MARKS:]:
        values = attempts[number]
        from_step = values.get("resumed_from_step")
        start = from_step if is_count(from_step) else 0
        how = "starts" if from_step is None else f"resumes from step {start}"
        text = f"Attempt {number} {how}"
        yield Mark("attempt", start, moment(values.get("time")), text, number)
        last = metrics.attempts[number][1] if number in metrics.attempts else None
        step = last_step(number, attempts, metrics)
        ended = ends.get(number)
        if ended is None:
            if number != newest or state.kind == "dead":
                text = f"Attempt {number} has no recorded end: killed, or its machine was lost"
                yield Mark("fault", step, last.time if last else None, text, number)
            continue
        code, time = ended.code, ended.time
        text = f"Attempt {number} ended with exit code {code}: {ended.reason[:_TEXT]}"
        if code == Exit.DONE:
            yield Mark("finish", step, time, f"Attempt {number} finished the run", number)
        elif code in (Exit.PREEMPTED, Exit.STOPPED_AT_ONCE):
            yield Mark("stop", step, time, text, number)
        else:
            yield Mark("fault", step, time, text, number)


def last_step(number: int, attempts: Mapping[int, Mapping[str, Any]], metrics: Metrics) -> int:
    """The last step of an attempt that is kept: that of its last row, or a later one from which the
    next attempt resumed."""
    last = metrics.attempts[number][1].step if number in metrics.attempts else 0
    around = (attempts.get(each, {}).get("resumed_from_step") for each in (number, number + 1))
    return max(last, *(step if is_count(step) else 0 for step in around))


def _hangs(
    directory: Path, metrics: Metrics, attempts: Mapping[int, Mapping[str, Any]]
) -> Iterator[Mark]:
    """The reports of the watchdog."""
    for entry in _entries(directory / "hangs"):
        named = _HANG.fullmatch(entry.name)
        if not named or int(named[1]) not in attempts:
            continue
        number = int(named[1])
        with suppress(OSError):
            refuse_link(entry)
            with os.fdopen(open_regular(entry / "report.txt"), "rb") as file:
                text = file.read(_TEXT).decode("utf-8", "replace").strip()
                time = os.fstat(file.fileno()).st_mtime
            last = metrics.attempts[number][1] if number in metrics.attempts else None
            step = last.step if last else 0
            yield Mark("fault", step, time, f"Attempt {number} hung: {text}", number)


def _failures(directory: Path, clock: Clock) -> Iterator[Mark]:
    """The failure records of the node agent."""
    for entry in _entries(directory / "failures"):
        try:
            record = read_object(entry, _FAILURE, limit=1 << 20)
        except (OSError, ValueError):
            continue
        time, first = moment(record["time"]), record["first"]
        where = ""
        if has_fields(first, {"rank": int, "host": str}):
            who = "the agent" if first["rank"] == AGENT_RANK else f"rank {first['rank']}"
            where = f" ({who} on {first['host']} ended first)"
        error = first.get("error")
        detail = f": {error}" if isinstance(error, str) and error else ""
        text = f"The node agent recorded: {record['what']}{where}{detail}"[:_TEXT]
        yield Mark("fault", clock.step(time) if time else 0, time, text)


def _entries(folder: Path) -> list[Path]:
    """The newest entries of a directory by name; none where it is no directory."""
    try:
        refuse_link(folder)
        return sorted(folder.iterdir())[-_FILES:]
    except OSError:
        return []
