"""Notices a run that hangs, says which ranks are behind and where, and ends it.

Each rank leaves heartbeats in the run directory, written by a thread of their own: a rank that is
frozen, or gone, stops leaving them, and one that is stuck goes on saying where.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.exits import Exit
from train.process.emergency_output import write_stderr
from train.section import Section, non_semantic

_log = logging.getLogger("train")


class WatchdogConfig(Section):
    """When a run counts as hanging. It then ends with exit code 75 and a report."""

    first_timeout: float | None = non_semantic(1800.0, gt=0.0)
    """Seconds without progress until the first step is complete; null for no limit."""

    timeout: float | None = non_semantic(600.0, gt=0.0)
    """Seconds without progress from then on: for a step, an evaluation batch, or a save."""


@dataclass
class Heartbeat:
    """What a rank is doing; beats are cheap, and counted: ranks beat alike."""

    phase: str = "start"
    step: int = 0
    beats: int = 0
    at: float = 0.0
    """Monotonic seconds of the last beat."""
    first_step_done: bool = False
    """Whether the first step is complete."""

    def complete_step(self) -> None:
        """A step is complete: from now on the limit is that of later steps."""
        self.first_step_done = True

    def update(self, phase: str, step: int) -> None:
        """The rank begins another piece of work."""
        self.phase, self.step, self.at = phase, step, time.monotonic()
        self.beats += 1


class StartTimeout:
    """While entered, ends the process where it does not get further: the ranks have not met yet,
    and have no directory to leave heartbeats in."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._limit = config.first_timeout
        self._timer = threading.Timer(self._limit or 0.0, self._too_late)
        self._timer.daemon = True

    def __enter__(self) -> StartTimeout:
        if self._limit is not None:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _too_late(self) -> None:
        write_stderr(
            f"error: The ranks have not all met within watchdog.first_timeout, {self._limit:g} s; "
            "below is where this one waits. See what became of the others, then start it again."
        )
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(Exit.RETRY)


class Watchdog:
    """Watches this rank's heart while entered. ``directory`` is the run's."""

    def __init__(
        self, config: WatchdogConfig, directory: Path, rank: int, world_size: int, attempt: int
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.heartbeat = Heartbeat(at=time.monotonic())
        self._beats = directory / "heartbeats"
        self._hang = directory / "hangs" / f"attempt-{attempt}"
        limits = [t for t in (config.first_timeout, config.timeout) if t is not None]
        self._interval = min(10.0, min(limits) / 10) if limits else 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._interval:
            self._beats.mkdir(exist_ok=True)
            self._publish()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError):
            self._mine.unlink(missing_ok=True)
        with suppress(OSError):
            self._beats.rmdir()  # the last one

    @property
    def _mine(self) -> Path:
        return self._beats / f"rank-{self.rank}.json"

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._publish()
            limit = (
                self.config.timeout if self.heartbeat.first_step_done else self.config.first_timeout
            )
            silent = time.monotonic() - self.heartbeat.at
            if limit is not None and silent > limit:
                self._give_up(limit)

    def _publish(self) -> None:
        heartbeat = self.heartbeat
        values = {
            "rank": self.rank, "host": socket.gethostname(), "phase": heartbeat.phase,
            "step": heartbeat.step, "beats": heartbeat.beats, "time": time.time(),
            "silent": time.monotonic() - heartbeat.at,
        }  # fmt: skip
        with suppress(OSError):  # a full disk is not what is watched here
            temporary = self._mine.with_suffix(".new")
            temporary.write_text(json.dumps(values), encoding="utf-8")
            temporary.replace(self._mine)

    def _give_up(self, limit: float) -> None:
        """Leaves this rank's stacks; one rank writes the report for all."""
        noticed = time.time()  # from now on those that live no longer publish either
        with suppress(OSError):
            self._hang.mkdir(parents=True, exist_ok=True)
            with (self._hang / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        report = self._hang / "report.txt"
        try:
            (self._hang / "reporter").touch(exist_ok=False)
        except FileExistsError:
            self._wait_for(report)
        except OSError:
            pass  # then each says what it knows
        else:
            self._wait_for_stacks()
            self._report(report, limit, noticed)
        write_stderr(f"error: The run hung; {report} says where. Start it again to go on.")
        os._exit(Exit.RETRY)

    def _wait_for_stacks(self) -> None:
        """All ranks hang together; give the others a moment to leave their stacks."""
        deadline = time.monotonic() + max(2.0, 3 * self._interval)
        while time.monotonic() < deadline:
            if len(list(self._hang.glob("rank-*.txt"))) == self.world_size:
                return
            time.sleep(0.05)

    def _wait_for(self, report: Path) -> None:
        deadline = time.monotonic() + max(4.0, 6 * self._interval)
        while not report.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _report(self, path: Path, limit: float, noticed: float) -> None:
        ranks = self._everyone()
        text = describe_hang(ranks, self.world_size, limit, noticed)
        for rank in range(self.world_size):
            with suppress(OSError):
                stacks = (self._hang / f"rank-{rank}.txt").read_text(encoding="utf-8")
                text += f"\n\nrank {rank}:\n{stacks}"
        _log.error("%s", text)
        first = text.splitlines()[0]
        write_stderr(f"error: {first}")
        with suppress(OSError):
            temporary = path.with_suffix(".new")
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)

    def _everyone(self) -> list[dict[str, Any]]:
        found = []
        for rank in range(self.world_size):
            with suppress(OSError, ValueError):
                text = (self._beats / f"rank-{rank}.json").read_text(encoding="utf-8")
                found.append(json.loads(text))
        return found


def describe_hang(ranks: list[dict[str, Any]], world_size: int, limit: float, now: float) -> str:
    """Which ranks are behind, in one line, and then a line for each. A heartbeat that is older
    than half of ``limit`` at the time ``now`` is that of a process that is frozen or gone."""
    stale = limit / 2
    gone = [r for r in ranks if now - r["time"] > stale]
    unheard = sorted(set(range(world_size)) - {r["rank"] for r in ranks})
    most = max((r["beats"] for r in ranks), default=0)
    behind = [r for r in ranks if r["beats"] < most and r not in gone]
    parts = [
        f"rank {r['rank']} ({r['host']}) is frozen or gone: not heard of for "
        f"{now - r['time']:.0f} s, last in {r['phase']} of step {r['step'] + 1}"
        for r in gone
    ]
    parts += [f"rank {rank} was never heard of" for rank in unheard]
    parts += [
        f"rank {r['rank']} ({r['host']}) is behind, in {r['phase']} of step {r['step'] + 1} for "
        f"{r['silent']:.0f} s"
        for r in behind
    ]
    if not parts and ranks:
        first = ranks[0]
        who = "the process" if world_size == 1 else "all ranks"
        parts = [f"{who} stood still in {first['phase']} of step {first['step'] + 1}"]
    lines = [f"No progress for {limit:g} s: {'; '.join(parts)}."]
    lines += [
        f"  rank {r['rank']} on {r['host']}: {r['phase']} of step {r['step'] + 1}, "
        f"for {r['silent']:.1f} s, heard of {now - r['time']:.1f} s ago"
        for r in ranks
    ]
    return "\n".join(lines)
