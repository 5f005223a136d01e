"""The ledger's lines put together: each launch with what became of it."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.contract import UsageError, did_you_mean, run_directory
from launch.history import ledger
from launch.history.quietly import quietly


@dataclass
class Launch:
    """One launch."""

    line: dict[str, Any]
    """What was recorded at its submission."""
    end: dict[str, Any] | None = None
    """What was recorded at its end."""
    notes: list[str] = field(default_factory=list)
    """What the scheduler says of it, once it was asked, or said of it when it had ended."""

    @property
    def handle(self) -> str:
        """TorchX's name for the job."""
        return str(self.line["handle"])

    @property
    def job(self) -> str:
        """The scheduler's name for it."""
        return self.handle.rpartition("/")[2]

    @property
    def run_id(self) -> str:
        """The run that it started, or went on with."""
        return str(self.line["run_id"])

    @property
    def state(self) -> str:
        """The final one; UNKNOWN until the scheduler was asked, and for as long as it runs."""
        return str(self.end["state"]) if self.end else "UNKNOWN"

    @property
    def exit_code(self) -> int | None:
        """Of the first node that says more than that it was stopped."""
        return ledger.telling_code(self.end["exit_codes"]) if self.end else None

    @property
    def when(self) -> str:
        """Of its submission, in local time."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.line["time"]))

    @property
    def training(self) -> list[str]:
        """The command under the agent."""
        words = [str(word).replace("$$", "$") for word in self.line["command"]]
        return words[words.index("--") + 1 :] if "--" in words else words

    def run_directory(self) -> Path | None:
        """Where its run writes, if that can be told from here."""
        here = Path.cwd()
        try:
            # Config files and run.dir may be relative to where it was submitted.
            os.chdir(self.line["directory"])
            found = run_directory(self.training)
            return Path(self.line["directory"]) / found if found else None
        except OSError:
            return None
        finally:
            os.chdir(here)

    def failures(self) -> list[dict[str, Any]]:
        """The agents' records of failures of this launch, the oldest first."""
        directory = self.run_directory()
        found = []
        for file in sorted((directory / "failures").glob("*.json")) if directory else []:
            with suppress(OSError, ValueError):
                record = json.loads(file.read_text(encoding="utf-8"))
                if self.line["time"] <= record["time"] <= (self.end or {}).get("time", time.time()):
                    found.append(record)
        return found

    def refresh(self) -> str:
        """The state now; asks the scheduler, unless the end is known."""
        if self.end:
            found = ledger.Said(self.end.get("message", ""), tuple(self.end.get("replicas", ())))
            self.notes = found.lines
            return self.state
        if self.line["scheduler"] == "local_cwd":
            return self._local_state()
        try:
            with quietly():
                from torchx.runner import get_runner

                with get_runner() as runner:
                    status = runner.status(self.handle)
        except Exception as error:  # whatever a cluster's client raises
            text = str(error).strip().splitlines()
            self.notes.append(
                f"{self.line['scheduler']} cannot be asked: {(text or [repr(error)])[0]}"
            )
            return "UNKNOWN"
        if status is None:
            self.notes.append(f"{self.line['scheduler']} knows it no longer")
            return "GONE"
        self.notes += ledger.said(status.msg, status.roles).lines
        if status.state.name in ledger.FINAL:  # asking has recorded it
            unknown = {"time": time.time(), "state": status.state.name, "exit_codes": []}
            ends = (x for x in ledger.read() if x["event"] == "ended")
            self.end = next((x for x in ends if x.get("handle") == self.handle), unknown)
        return str(status.state.name)

    def _local_state(self) -> str:
        """Such a job ends with the command that submitted it."""
        if self.line["host"] != socket.gethostname():
            return "UNKNOWN"
        with suppress(OSError):
            if b"torchx" in Path(f"/proc/{self.line['pid']}/cmdline").read_bytes():
                return "RUNNING"
        self.notes.append("the command that it ran under was killed")
        return "LOST"


def all_launches() -> list[Launch]:
    """The oldest first."""
    found: dict[str, Launch] = {}
    for line in ledger.read():
        if line.get("event") == "submitted":
            found[line["handle"]] = Launch(line)
        elif line.get("event") == "ended" and line.get("handle") in found:
            found[line["handle"]].end = line
    return list(found.values())


def find(word: str) -> Launch:
    """The newest launch with this run id, handle, job id, or name, or a run id that begins so.
    Raises UsageError."""
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
            raise UsageError(f"{word!r} may be any of {', '.join(names)}; name one of them.")
    names = [launch.run_id for launch in launches]
    hint = did_you_mean(word, names)
    raise UsageError(
        f"{word!r} is no launch in {ledger.path()}"
        + (hint if hint != "." else "; `python -m launch history` lists all.")
    )
