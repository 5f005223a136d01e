"""Reads goodput.jsonl: what the time of a run was used for, over all its attempts.

Imports neither torch nor numpy, so that it can be used for tables of many runs.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train.checkpoint.layout import parse_step_name
from train.exits import Exit
from train.files import TooLargeError, open_regular
from train.goodput.phases import LABELS, RECORDED, WORK, flush_interval
from train.json_files import LIMIT, Fields, has_fields, is_count, is_number, parsed_lines

FILE = "goodput.jsonl"
_LINE: Fields = {
    "attempt": int, "started": (int, float), "resumed": int, "step": int, "committed": int,
    "seconds": dict,
}  # fmt: skip
_LATEST = 1e11  # seconds since the epoch, and of a phase: three thousand years
_COMPLETE = (Exit.DONE, Exit.PREEMPTED)  # all steps of such an attempt are committed


@dataclass(frozen=True)
class AttemptTime:
    """One start of the run."""

    attempt: int
    """Its number. A start that fails before the attempt is recorded leaves its number to the
    next."""
    started: float
    """Start of rank 0's process; seconds since the epoch, on the clock of its host."""
    ended: float
    """Its end, or its last line in the ledger."""
    exit: int | None
    """Its exit code; None if it is in progress, or has ended without a chance to record it."""
    resumed: int
    """Completed steps at its start."""
    committed: int
    """Steps that it has taken and that count: a checkpoint has them, or may still get them."""
    lost: int
    """Steps that it has taken and that no checkpoint has."""
    seconds: Mapping[str, float]
    """By the names of ``train.goodput.phases.LABELS``; ``idle`` and ``queued`` come before its
    start."""


@dataclass(frozen=True)
class Goodput:
    """The time of a run."""

    attempts: tuple[AttemptTime, ...]
    running: bool
    """Whether the last attempt seems to be in progress: it wrote to the ledger recently."""
    seconds: Mapping[str, float] = field(init=False)
    """The sums over all attempts, by the names of ``train.goodput.phases.LABELS``."""

    def __post_init__(self) -> None:
        sums = {
            name: sum(attempt.seconds.get(name, 0.0) for attempt in self.attempts)
            for name in LABELS
        }
        object.__setattr__(self, "seconds", sums)

    @property
    def wall(self) -> float:
        """Seconds from the submission, or the first start, to the end or the last line."""
        return sum(self.seconds.values())

    @property
    def percent(self) -> float:
        """Committed compute in percent of the wall time."""
        return 100 * self.seconds["compute"] / self.wall if self.wall else 0.0

    @property
    def held(self) -> float:
        """Seconds in which the run had its machines: those of its attempts."""
        return self.wall - self.seconds["queued"] - self.seconds["idle"]

    @property
    def lost_steps(self) -> int:
        """Steps that were taken and that no checkpoint has."""
        return sum(attempt.lost for attempt in self.attempts)

    def summary(self) -> dict[str, float]:
        """The numbers for ``finished.json`` and for trackers, by plain names."""
        return {
            "percent": round(self.percent, 3),
            "wall_seconds": round(self.wall, 3),
            "attempts": len(self.attempts),
            "lost_steps": self.lost_steps,
            **{f"{name}_seconds": round(value, 3) for name, value in self.seconds.items()},
        }


def read_goodput(directory: Path, *, now: float | None = None) -> Goodput | None:
    """The time of the run in ``directory``; None where its ledger is missing or has no line.

    Lines that are damaged or cut off are ignored. Raises OSError for a ledger that cannot be read,
    that is no regular file, or that has more than 64 MiB.
    """
    starts = _starts(directory / FILE)
    if not starts:
        return None
    last = starts[-1]
    silent = (time.time() if now is None else now) - last.end
    running = last.exit is None and silent < max(15.0, 3 * flush_interval(last.total))
    if running:
        until = max(last.reached, last.committed)
    else:
        until = max(last.committed, _newest_checkpoint(directory))
    times: list[AttemptTime] = []
    for start in reversed(starts):
        times.append(start.time(until, is_running=running and start is last))
        until = min(until, start.resumed)
    times.reverse()
    return Goodput(tuple(_with_gaps(times, starts)), running)


class _Start:
    """The lines of one start: the last one, and the checkpoints of all."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.saves: list[tuple[int, dict[str, float]]] = []
        self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line that ``_is_valid``."""
        self.attempt: int = line["attempt"]
        self.started: float = line["started"]
        self.resumed: int = line["resumed"]
        self.submitted: float | None = line.get("submitted")
        self.committed: int = line["committed"]
        self.exit: int | None = line.get("exit")
        self.seconds = {name: float(line["seconds"].get(name, 0.0)) for name in RECORDED}
        for step, *seconds in line.get("saves", []):
            self.saves.append((step, dict(zip(WORK, seconds, strict=True))))
        self.reached = max(line["step"], self.committed, *(step for step, _ in self.saves), 0)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def end(self) -> float:
        return self.started + self.total

    def time(self, until: int, *, is_running: bool) -> AttemptTime:
        """Its times, where the steps up to ``until`` count."""
        counted = max(0, min(self.reached, until) - self.resumed)
        lost = max(0, self.reached - self.resumed) - counted
        seconds = dict(self.seconds)
        if lost or not (is_running or self.exit in _COMPLETE):
            kept: Mapping[str, float] = {}
            for step, at_save in self.saves:
                kept = at_save if self.resumed < step <= until else kept
            seconds["lost"] = 0.0
            for name in WORK:
                less = max(0.0, seconds[name] - kept.get(name, 0.0))
                seconds[name] -= less
                seconds["lost"] += less
        return AttemptTime(
            self.attempt, self.started, self.end, self.exit, self.resumed, counted, lost, seconds
        )


def _with_gaps(times: list[AttemptTime], starts: list[_Start]) -> Iterator[AttemptTime]:
    """Adds to each start the time before it: queued since its submission, or idle."""
    end: float | None = None
    for attempt, start in zip(times, starts, strict=True):
        queued = idle = 0.0
        # A scheduler that starts a job again passes on when it was submitted first.
        if start.submitted is not None and (end is None or start.submitted > end):
            queued = max(0.0, start.started - start.submitted)
        if end is not None:
            # Clocks of hosts differ: a start may seem to be before the end of the one before.
            idle = max(0.0, start.started - queued - end)
        yield replace(attempt, seconds={**attempt.seconds, "queued": queued, "idle": idle})
        end = start.end


def _starts(path: Path) -> list[_Start]:
    """The starts in the ledger, in its order."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return []
    starts: dict[tuple[int, float], _Start] = {}
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LIMIT:
            text = f"it has {size:,} bytes, more than the {LIMIT:,} that it may have"
            raise TooLargeError(errno.EFBIG, text, str(path))
        for _, line in parsed_lines(file):
            if line is None or not _is_valid(line):
                continue
            key = line["attempt"], line["started"]
            if key in starts:
                starts[key].add(line)
            else:
                starts[key] = _Start(line)
    return list(starts.values())


def _is_valid(line: dict[str, Any]) -> bool:
    saves = line.get("saves", [])
    return (
        has_fields(line, _LINE)
        and all(is_count(line[name]) for name in ("attempt", "resumed", "step", "committed"))
        and all(_is_time(value) for value in line["seconds"].values())
        and all(_is_time(line.get(name, 0)) for name in ("started", "submitted"))
        and type(line.get("exit", 0)) is int
        and isinstance(saves, list)
        and all(
            isinstance(save, list)
            and len(save) == 1 + len(WORK)
            and is_count(save[0])
            and all(_is_time(value) for value in save[1:])
            for save in saves
        )
    )


def _is_time(value: object) -> bool:
    return is_number(value) and 0 <= value < _LATEST


def _newest_checkpoint(directory: Path) -> int:
    """The step of the newest committed checkpoint in the run directory; 0 without one."""
    steps = [0]
    with suppress(OSError):
        steps += [parse_step_name(p.name) or 0 for p in (directory / "checkpoints").iterdir()]
    return max(steps)
