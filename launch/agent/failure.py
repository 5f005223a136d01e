"""How ranks ended, which of them failed first, and the records of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.contract import (
    ADVICE,
    FAILURES,
    Exit,
    finite_number,
    is_worth_retrying,
    open_regular,
    redact,
    redact_values,
    refuse_link,
    whole_number,
)
from launch.failure_record import headline

TERMINATION_BYTES = 4096  # Kubernetes' limit for termination messages
_TAIL_LINES = 20
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class RankFailure:
    """A rank that did not exit with 0."""

    rank: int
    local_rank: int
    host: str
    pid: int
    exit_code: int
    """As a shell reports it: 128 + N after signal N."""
    error: str
    """The rank's error message without traceback; empty if it left none."""
    time: float
    """Seconds since the epoch."""
    log: list[str]
    """The last lines of its standard error."""
    stopped: bool = False
    """Whether the agent ended it because other ranks had failed."""
    overdue: bool = False
    """Whether the agent killed it because it still ran long after a request to stop."""

    @property
    def what(self) -> str:
        """The exit code with its name."""
        if self.overdue:
            return "killed by the agent after --shutdown-timeout"
        if 128 < self.exit_code < 128 + 65:
            with suppress(ValueError):
                name = signal.Signals(self.exit_code - 128).name
                return "preempted (143)" if self.exit_code == 143 else f"killed by {name}"
        with suppress(ValueError):
            return f"exit code {self.exit_code} ({Exit(self.exit_code).name})"
        return f"exit code {self.exit_code}"


def shell_code(code: int) -> int:
    """A process's return code as a shell reports it; Python makes signals negative."""
    return 128 - code if code < 0 else code


def first_failure(failures: Iterable[RankFailure]) -> RankFailure:
    """The failure that caused the others.

    Times alone do not tell: clocks of nodes differ, and a cause may be reported late. So a rank
    with an error that will recur comes before one that was killed or met an infrastructure failure,
    then one that was stopped on request, then one that only lost its peers, then one that the
    agent ended because of others. Among equals the earliest comes first.
    """

    def weight(failure: RankFailure) -> int:
        if failure.stopped:
            return 4
        if failure.exit_code == Exit.RETRY:
            return 1 if failure.error else 3
        if failure.exit_code == Exit.PREEMPTED:
            return 2
        return 0 if failure.error else 1

    return min(failures, key=lambda f: (weight(f), f.time, f.rank))


@dataclass(frozen=True)
class Outcome:
    """How the ranks of all nodes ended, if not all exited with 0."""

    first: RankFailure
    failures: list[RankFailure]
    lost_nodes: list[int]
    """Nodes that did not report."""

    @classmethod
    def of(cls, failures: list[RankFailure], lost_nodes: list[int], *, asked: bool) -> Outcome:
        """The outcome of the failures of all nodes. ``asked``: a node that reported was asked to
        stop. If none was, ranks that stopped on request did so because the agent of a lost node had
        stopped its own."""
        first = first_failure(failures)
        if lost_nodes and not asked and first.exit_code == Exit.PREEMPTED:
            error = "the agent of a lost node has stopped the ranks of all nodes"
            lost = replace(first, exit_code=int(Exit.RETRY), error=error)
            failures, first = [lost if f is first else f for f in failures], lost
        return cls(first, failures, lost_nodes)

    @property
    def exit_code(self) -> int:
        """The first failing rank's."""
        return self.first.exit_code

    @property
    def retry(self) -> bool:
        """Whether a restart may help."""
        return is_worth_retrying(self.exit_code)

    @property
    def advice(self) -> str:
        """What to do."""
        return advice(self.exit_code, overdue=self.first.overdue)

    def record(self, **more: Any) -> dict[str, Any]:
        """The failure record, for JSON, without secrets."""
        first = asdict(self.first)
        first["log"] = _without_secrets(self.first.log)
        record = {
            "exit_code": self.exit_code,
            "what": self.first.what,
            "retry": self.retry,
            "advice": self.advice,
            "first": first,
            "others": [
                {"rank": f.rank, "host": f.host, "exit_code": f.exit_code}
                for f in self.failures
                if f is not self.first
            ],
            "lost_nodes": self.lost_nodes,
            **more,
        }
        return {key: redact_values(value) for key, value in record.items()}

    def paragraph(self) -> str:
        """The message for people."""
        first = self.first
        text = headline(self.record())
        text += f", {redact(first.error)}" if first.error else "."
        if not text.endswith((".", "!", "?")):
            text += "."
        others = len(self.failures) - 1
        if others:
            text += f" {others} other rank{'s' if others > 1 else ''} ended after it."
        if self.lost_nodes:
            text += f" Node {', '.join(map(str, self.lost_nodes))} did not report."
        text += f" What to do: {self.advice}."
        if first.log and not first.error:
            lines = "\n".join(f"    {line}" for line in _without_secrets(first.log)[-5:])
            text += f"\n  last lines of its standard error:\n{lines}"
        return text


def advice(code: int, *, overdue: bool = False) -> str:
    """What to do after an exit code, whether isorun's or not; ``overdue``: of a rank that the agent
    killed because it did not stop."""
    if overdue:
        return (
            "if the rank was saving, increase --shutdown-timeout, else find out why it did not "
            "stop; then rerun"
        )
    with suppress(ValueError):
        return ADVICE[Exit(code)]
    if is_worth_retrying(code):
        return "find out what killed it (out of memory, a person, a scheduler), then rerun"
    return "read the log above this line"


def error_of(message: Any) -> tuple[str, float | None]:
    """Error and time in a rank's error file, which has torch's format."""
    if isinstance(message, dict):
        info = message.get("extraInfo")
        stamp = finite_number(str(info.get("timestamp"))) if isinstance(info, dict) else None
        text = re.sub(r"^\w+(\.\w+)*Error: ", "", str(message.get("message", "")))
        return text.strip(), stamp or None
    return str(message).strip(), None


def tail(path: str | Path) -> list[str]:
    """The last lines of a log, without secrets; empty if it cannot be read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = file.seek(0, 2)
            skipped = file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    if skipped:  # a part of a line may be a part of a secret, which nothing shows
        text = re.sub(r"\A(?:.*\n|\S*)", "", text)
    # As a whole, since a private key may begin before the last lines.
    text = redact(text)
    return [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def _without_secrets(lines: Sequence[str]) -> list[str]:
    """The lines without secrets, also without one that has several lines."""
    return redact("\n".join(lines)).splitlines()


def write_record(directory: Path, record: dict[str, Any]) -> Path:
    """Writes the record to the next free number in the run directory's ``failures/``.

    Raises OSError, also where there is no run directory: a wrong or absent path must not become
    one.
    """
    folder = directory / FAILURES
    refuse_link(folder)
    folder.mkdir(exist_ok=True)
    text = json.dumps({**record, "time": time.time()}, indent=1)
    number = 1 + max((whole_number(p.stem) or 0 for p in folder.glob("*.json")), default=0)
    while True:
        path = folder / f"{number:04d}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:  # written by another node's agent
            number += 1


def write_termination(path: Path, record: dict[str, Any]) -> None:
    """Writes the record as a container's termination message, shortened to 4096 bytes.

    Raises OSError.
    """
    lines: Sequence[str] = record["first"]["log"]
    error: str = record["first"]["error"]
    while True:
        first = {**record["first"], "log": list(lines), "error": error}
        text = json.dumps({**record, "first": first, "others": record["others"][:8]})
        if len(text.encode()) <= TERMINATION_BYTES:
            break
        if lines:
            lines = lines[1:]
        elif error:
            error = error[: len(error) // 2]
        else:
            record = {key: record[key] for key in ("exit_code", "what", "advice")}
            text = json.dumps({**record, "first": {**first, "host": first["host"][:64]}})
            break
    path.write_text(text, encoding="utf-8")
