"""Detects a hang, reports which ranks are behind and where, and ends the run.

A thread of each rank writes a heartbeat file in the run directory. A frozen or dead rank stops
writing it; a rank that is stuck in the main thread still reports its phase.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from train.exits import Exit
from train.files import create, read_bytes, refuse_link, replace_text
from train.json_files import LIMIT, Fields, read_object
from train.process.abrupt_end import AbruptEnd, within
from train.process.emergency_output import write_stderr
from train.process.nccl_reports import flight_recorder, ras_status, uses_gpu
from train.section import Section, non_semantic

_HEARTBEAT: Fields = {
    "rank": int, "host": str, "phase": str, "step": int, "beats": int, "time": (int, float),
    "silent": (int, float),
}  # fmt: skip
REPORT_SECONDS = 30.0  # within which the report is written, unless the disk does not answer
_log = logging.getLogger("train")


class WatchdogConfig(Section):
    """When a run counts as hung. It then ends with exit code 75 and a report."""

    first_timeout: float | None = non_semantic(1800.0, gt=0.0)
    """Seconds without progress until the first step is complete; null for no limit."""

    timeout: float | None = non_semantic(600.0, gt=0.0)
    """Seconds without progress after the first step: for a step, an evaluation batch, or a save."""


class Calls(Protocol):
    """What this rank has done, for a comparison with the other ranks once the run hangs."""

    def so_far(self) -> list[int]:
        """Numbers for ``fault``; called in the watchdog's thread."""

    def fault(self, by_rank: Mapping[int, Sequence[int]]) -> str | None:
        """Why the ranks wait for each other, in a sentence that says what to change, if the numbers
        of the ranks show that a repetition would hang as well. Some ranks may be missing."""


@dataclass
class Heartbeat:
    """The phase of a rank. All ranks make the same updates, so a lower count means behind."""

    phase: str = "start"
    step: int = 0
    beats: int = 0
    """Number of updates."""
    at: float = 0.0
    """``time.monotonic()`` of the last update."""
    first_step_done: bool = False
    """Whether the first step is complete."""
    calls: Calls | None = None
    """What the strategy records of this rank; None until the model is built."""

    def complete_step(self) -> None:
        """A step is complete: from now on the limit is that of later steps."""
        self.first_step_done = True

    def update(self, phase: str, step: int) -> None:
        """Records that the rank enters a phase."""
        self.phase, self.step, self.at = phase, step, time.monotonic()
        self.beats += 1


class StartTimeout:
    """A context manager that ends the process after ``watchdog.first_timeout``.

    It covers the rendezvous, before which there is no run directory for heartbeats.
    """

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
            f"error: Not all ranks joined within watchdog.first_timeout ({self._limit:g} s); this "
            "rank waits at the stack below. Check the logs of the other ranks, then rerun."
        )
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(Exit.RETRY)


class Watchdog:
    """A context manager that watches this rank's heartbeat. ``directory`` is the run directory, on
    a disk that may not answer."""

    def __init__(
        self,
        config: WatchdogConfig,
        directory: Path,
        rank: int,
        world_size: int,
        attempt: int,
        abrupt_end: AbruptEnd | None = None,
    ) -> None:
        self._abrupt_end = abrupt_end or AbruptEnd()
        self.config, self.rank, self.world_size = config, rank, world_size
        self.heartbeat = Heartbeat(at=time.monotonic())
        self._heartbeats = directory / "heartbeats"
        self._folder: int | None = None
        """A descriptor of it: another directory may get its path."""
        self._hang = directory / "hangs" / f"attempt-{attempt}"
        limits = [t for t in (config.first_timeout, config.timeout) if t is not None]
        self._interval = min(10.0, min(limits) / 10) if limits else 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._writer = threading.Thread(
            target=self._write_heartbeats, name="heartbeat", daemon=True
        )

    def __enter__(self) -> Watchdog:
        if self._interval:
            refuse_link(self._heartbeats)
            self._heartbeats.mkdir(exist_ok=True)
            self._folder = os.open(self._heartbeats, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            self._write_heartbeat()
            self._thread.start()
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._writer.join()
        if self._folder is None:
            return
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._folder)
        with suppress(OSError):
            if os.path.samestat(self._heartbeats.stat(), os.fstat(self._folder)):
                self._heartbeats.rmdir()  # the last one
        os.close(self._folder)
        self._folder = None

    @property
    def _name(self) -> str:
        return f"rank-{self.rank}.json"

    def _write_heartbeats(self) -> None:
        while not self._ended.wait(self._interval):
            self._write_heartbeat()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            limit = (
                self.config.timeout if self.heartbeat.first_step_done else self.config.first_timeout
            )
            silent = time.monotonic() - self.heartbeat.at
            if limit is not None and silent > limit:
                self._end_hung_run(limit)

    def _write_heartbeat(self) -> None:
        heartbeat = self.heartbeat
        values = {
            "rank": self.rank, "host": socket.gethostname(), "phase": heartbeat.phase,
            "step": heartbeat.step, "beats": heartbeat.beats, "time": time.time(),
            "silent": time.monotonic() - heartbeat.at,
        }  # fmt: skip
        with suppress(OSError):  # such as a full disk
            folder, temporary = self._folder, f"rank-{self.rank}.new"
            with os.fdopen(create(temporary, dir_fd=folder), "w") as file:
                json.dump(values, file)
            os.replace(temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder)

    def _end_hung_run(self, limit: float) -> None:
        """Writes what is known, and ends the process."""
        noticed = time.time()  # live ranks stop writing heartbeats as well from now on
        seconds = REPORT_SECONDS + 10 * self._interval  # the ranks wait for each other
        reason, fault = within(seconds, lambda: self._explain(limit, noticed)) or ("", None)
        advice = fault or "Rerun to resume from the last checkpoint."
        write_stderr(f"error: The run hung; see {self._hang / 'report.txt'}. {advice}")
        self._abrupt_end.end(
            Exit.USAGE if fault else Exit.RETRY, reason or f"No progress for {limit:g} s"
        )

    def _explain(self, limit: float, noticed: float) -> tuple[str, str | None]:
        """Writes this rank's stacks; one rank writes the report for all. Returns its first line,
        and why the run would hang again."""
        with suppress(OSError):
            self._hang.parent.mkdir(exist_ok=True)  # never the run directory, if it was moved
            self._hang.mkdir(exist_ok=True)
            refuse_link(self._hang.parent)
            refuse_link(self._hang)
            if self.heartbeat.calls:
                with os.fdopen(create(self._calls_of(self.rank)), "w") as file:
                    json.dump({"calls": self.heartbeat.calls.so_far()}, file)
            dump = flight_recorder(os.environ, self.rank) if uses_gpu() else None
            with os.fdopen(create(self._hang / f"rank-{self.rank}.txt"), "w") as file:
                if dump:
                    print(f"NCCL flight recorder: {dump} (read it with torchfrtrace)", file=file)
                    file.flush()  # faulthandler writes to the descriptor
                faulthandler.dump_traceback(file, all_threads=True)
        report = self._hang / "report.txt"
        try:
            (self._hang / "reporter").touch(exist_ok=False)
        except FileExistsError:
            self._wait_for(report)
        except OSError:
            pass  # no shared directory: only the line below
        else:
            self._wait_for_stacks()
            self._report(report, limit, noticed)
        first = ""
        with suppress(OSError):
            first = read_bytes(report, LIMIT).decode(errors="replace").partition("\n")[0]
        return first, self._fault()

    def _calls_of(self, rank: int) -> Path:
        return self._hang / f"calls-{rank}.json"

    def _fault(self) -> str | None:
        """Why the run would hang again, if the calls of the ranks show it."""
        by_rank = {}
        for rank in range(self.world_size):
            with suppress(OSError, ValueError):
                calls = read_object(self._calls_of(rank), {"calls": list})["calls"]
                if all(type(call) is int for call in calls):
                    by_rank[rank] = calls
        return self.heartbeat.calls.fault(by_rank) if self.heartbeat.calls else None

    def _wait_for_stacks(self) -> None:
        """Waits for the stacks of the other ranks, which time out at about the same time."""
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
        ranks = self._read_heartbeats()
        text = describe_hang(ranks, self.world_size, limit, noticed)
        if fault := self._fault():
            text += f"\n\n{fault}"
        if uses_gpu() and (status := ras_status(os.environ)):
            text += f"\n\nNCCL RAS:\n{status}"
        for rank in range(self.world_size):
            with suppress(OSError):
                stacks = read_bytes(self._hang / f"rank-{rank}.txt", LIMIT).decode(errors="replace")
                text += f"\n\nrank {rank}:\n{stacks}"
        _log.error("%s", text)
        first = text.splitlines()[0]
        write_stderr(f"error: {first}")
        with suppress(OSError):
            replace_text(path, text + "\n")

    def _read_heartbeats(self) -> list[dict[str, Any]]:
        found = []
        for rank in range(self.world_size):
            with suppress(OSError, ValueError):
                found.append(read_object(self._heartbeats / f"rank-{rank}.json", _HEARTBEAT))
        return found


def describe_hang(ranks: list[dict[str, Any]], world_size: int, limit: float, now: float) -> str:
    """One line that names the ranks that are behind, then one line per rank.

    A rank whose heartbeat is older than ``limit`` / 2 seconds at ``now`` (seconds since the epoch)
    is reported as frozen or dead.
    """
    stale = limit / 2
    gone = [r for r in ranks if now - r["time"] > stale]
    missing = sorted(set(range(world_size)) - {r["rank"] for r in ranks})
    most = max((r["beats"] for r in ranks), default=0)
    behind = [r for r in ranks if r["beats"] < most and r not in gone]
    parts = [
        f"rank {r['rank']} ({r['host']}) is frozen or dead: no heartbeat for "
        f"{now - r['time']:.0f} s, last in {r['phase']} of step {r['step'] + 1}"
        for r in gone
    ]
    parts += [f"rank {rank} never sent a heartbeat" for rank in missing]
    parts += [
        f"rank {r['rank']} ({r['host']}) is behind, in {r['phase']} of step {r['step'] + 1} for "
        f"{r['silent']:.0f} s"
        for r in behind
    ]
    if not parts and ranks:
        first = ranks[0]
        who = "the process" if world_size == 1 else "all ranks"
        parts = [f"{who} made no progress in {first['phase']} of step {first['step'] + 1}"]
    lines = [f"No progress for {limit:g} s: {'; '.join(parts)}."]
    lines += [
        f"  rank {r['rank']} on {r['host']}: {r['phase']} of step {r['step'] + 1}, "
        f"for {r['silent']:.1f} s, last heartbeat {now - r['time']:.1f} s ago"
        for r in ranks
    ]
    return "\n".join(lines)
