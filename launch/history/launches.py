"""The lines of the launch log, joined into launches with their current state."""

from __future__ import annotations

import os
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.contract import (
    FAILURES,
    UsageError,
    did_you_mean,
    first_line,
    read_object,
    run_directory,
    typed_command,
)
from launch.failure_record import is_complete
from launch.history import launch_log
from launch.history.quietly import quietly


@dataclass
class Launch:
    """One launch."""

    line: dict[str, Any]
    """The line of its submission."""
    end: dict[str, Any] | None = None
    """The line of its end."""
    notes: list[str] = field(default_factory=list)
    """What the scheduler reports about it, after ``refresh``."""

    @property
    def handle(self) -> str:
        """The app handle, TorchX's name for the job."""
        return str(self.line["handle"])

    @property
    def job(self) -> str:
        """The scheduler's name for the job."""
        return self.handle.rpartition("/")[2]

    @property
    def run_id(self) -> str:
        """The run that it started or resumed."""
        return str(self.line["run_id"])

    @property
    def state(self) -> str:
        """The recorded final state; UNKNOWN if no end is recorded."""
        return str(self.end["state"]) if self.end else "UNKNOWN"

    @property
    def exit_code(self) -> int | None:
        """The exit code of the first node that failed."""
        return launch_log.first_failure_code(self.end["exit_codes"]) if self.end else None

    @property
    def when(self) -> str:
        """The local time of its submission."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.line["time"]))

    @property
    def command(self) -> list[str]:
        """The command that the agent runs."""
        words = [str(word).replace("$$", "$") for word in self.line["command"]]
        return words[words.index("--") + 1 :] if "--" in words else words

    def run_directory(self) -> Path | None:
        """The run directory; None if it cannot be determined on this machine."""
        here = Path.cwd()
        try:
            # Config files and run.dir may be relative to the submitting directory.
            os.chdir(self.line["directory"])
            found = run_directory(self.command)
            return Path(self.line["directory"]) / found if found else None
        except OSError:
            return None
        finally:
            os.chdir(here)

    def failures(self) -> list[dict[str, Any]]:
        """The complete failure records that agents wrote during this launch, the oldest first."""
        directory = self.run_directory()
        found = []
        for file in sorted((directory / FAILURES).glob("*.json")) if directory else []:
            with suppress(OSError, ValueError):
                record = read_object(file)
                if not is_complete(record):
                    continue
                if self.line["time"] <= record["time"] <= (self.end or {}).get("time", time.time()):
                    found.append(record)
        return found

    def refresh(self) -> str:
        """The current state; asks the scheduler, unless the end is recorded."""
        if self.end:
            replicas = tuple(self.end.get("replicas", ()))
            self.notes = launch_log.StatusText(self.end.get("message", ""), replicas).lines
            return self.state
        if self.line["scheduler"] == "local_cwd":
            return self._local_state()
        try:
            with quietly():
                from torchx.runner import get_runner

                with get_runner() as runner:
                    status = runner.status(self.handle)
        except Exception as error:  # the clients of clusters raise many kinds
            self.notes.append(f"{self.line['scheduler']} does not answer: {first_line(error)}")
            return "UNKNOWN"
        if status is None:
            self.notes.append(f"{self.line['scheduler']} no longer has this job")
            return "GONE"
        self.notes += launch_log.StatusText.of(status.msg, status.roles).lines
        if status.state.name in launch_log.FINAL:  # the scheduler has recorded it
            unknown = {"time": time.time(), "state": status.state.name, "exit_codes": []}
            ends = (x for x in launch_log.read() if x["event"] == "ended")
            self.end = next((x for x in ends if x["handle"] == self.handle), unknown)
        return str(status.state.name)

    def _local_state(self) -> str:
        """A job of local_cwd ends with the command that submitted it."""
        if self.line["host"] != socket.gethostname():
            return "UNKNOWN"
        import psutil

        with suppress(psutil.Error):
            words = psutil.Process(self.line["pid"]).cmdline()
            if any("torchx" in word or word == "tune" for word in words):
                return "RUNNING"
        self.notes.append("the command that started it was killed")
        return "LOST"


def all_launches() -> list[Launch]:
    """All launches, the oldest first."""
    found: dict[str, Launch] = {}
    for line in launch_log.read():
        if line["event"] == "submitted":
            found[line["handle"]] = Launch(line)
        elif line["event"] == "ended" and line["handle"] in found:
            found[line["handle"]].end = line
    return list(found.values())


def last_launch() -> Launch:
    """The newest launch. Raises UsageError if there is none."""
    launches = all_launches()
    if not launches:
        raise UsageError(
            f"There is no launch in {launch_log.path()}, where `torchx run` records them; for a "
            "run that was started in another way, see its output and the logs/ and failures/ in "
            "its directory."
        )
    return launches[-1]


def find_launch(word: str) -> Launch:
    """The newest launch with this run id, handle, job id or name, or with a run id that starts
    with the word. Raises UsageError."""
    launches = all_launches()
    for matches in (
        lambda x: word in (x.run_id, x.handle, x.job),
        lambda x: word == x.line["name"],
        lambda x: x.run_id.startswith(word),
    ):
        found = [launch for launch in launches if matches(launch)]
        if found and (word == found[-1].line["name"] or len({x.run_id for x in found}) == 1):
            return found[-1]
        if found:
            names = sorted({x.run_id for x in found})
            raise UsageError(f"{word!r} matches {', '.join(names)}; give one of these.")
    names = [launch.run_id for launch in launches]
    hint = did_you_mean(word, names)
    raise UsageError(
        f"There is no launch {word!r} in {launch_log.path()}"
        + (hint if hint != "." else f"; list all with `{shlex.join(typed_command('history'))}`.")
    )
