"""How ranks ended, which of them failed first, and what is written about it."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.contract import ADVICE, Exit, is_worth_retrying

TERMINATION_BYTES = 4096  # Kubernetes keeps no more of a container's termination message
_TAIL_LINES = 20
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class Failure:
    """A rank that did not end with 0."""

    rank: int
    local_rank: int
    host: str
    pid: int
    exit_code: int
    """As a shell has it: 128 + N after signal N."""
    error: str
    """What the rank said of it, without its traceback; empty if it said nothing."""
    time: float
    """Seconds since the epoch."""
    log: list[str]
    """The last lines of its standard error."""
    stopped: bool = False
    """Whether the agent ended it because of others."""

    @property
    def what(self) -> str:
        """The exit code in words."""
        if 128 < self.exit_code < 128 + 65:
            with suppress(ValueError):
                name = signal.Signals(self.exit_code - 128).name
                return "preempted (143)" if self.exit_code == 143 else f"killed by {name}"
        with suppress(ValueError):
            return f"exit code {self.exit_code} ({Exit(self.exit_code).name})"
        return f"exit code {self.exit_code}"


def shell_code(code: int) -> int:
    """A process's return code as a shell has it: signals are negative for Python."""
    return 128 - code if code < 0 else code


def first_failure(failures: Iterable[Failure]) -> Failure:
    """The one that explains the others, whose clocks may differ and who may have noticed late.

    A rank that left an error that will come again counts before one that was killed or met a
    fault of the machine, before one that was stopped on request, before one that only lost its
    peers, before one that was ended because of others. Within these the earliest counts.
    """

    def weight(failure: Failure) -> int:
        if failure.stopped:
            return 4
        if failure.exit_code == Exit.RETRY:
            return 1 if failure.error else 3
        if failure.exit_code == Exit.PREEMPTED:
            return 2
        return 0 if failure.error else 1

    return min(failures, key=lambda f: (weight(f), f.time, f.rank))


@dataclass(frozen=True)
class Verdict:
    """What became of the ranks of all nodes."""

    first: Failure
    failures: list[Failure]
    lost_nodes: list[int]
    """Nodes that did not tell."""

    @property
    def exit_code(self) -> int:
        """The first failing rank's."""
        return self.first.exit_code

    @property
    def retry(self) -> bool:
        """Whether starting again may help."""
        return is_worth_retrying(self.exit_code)

    def record(self, **more: Any) -> dict[str, Any]:
        """For programs."""
        return {
            "exit_code": self.exit_code,
            "what": self.first.what,
            "retry": self.retry,
            "advice": advice(self.exit_code),
            "first": asdict(self.first),
            "others": [
                {"rank": f.rank, "host": f.host, "exit_code": f.exit_code}
                for f in self.failures
                if f is not self.first
            ],
            "lost_nodes": self.lost_nodes,
            **more,
        }

    def paragraph(self) -> str:
        """For people."""
        first = self.first
        text = f"Rank {first.rank} on {first.host} ended first: {first.what}"
        text += f", {first.error}" if first.error else "."
        if not text.endswith((".", "!", "?")):
            text += "."
        others = len(self.failures) - 1
        if others:
            text += f" {others} other rank{'s' if others > 1 else ''} ended after it."
        if self.lost_nodes:
            text += f" Nothing was heard of node {', '.join(map(str, self.lost_nodes))}."
        text += f" What to do: {advice(self.exit_code)}."
        if first.log and not first.error:
            text += "\n  its last lines:\n" + "\n".join(f"    {line}" for line in first.log[-5:])
        return text


def advice(code: int) -> str:
    """What to do after an exit code, known or not."""
    with suppress(ValueError):
        return ADVICE[Exit(code)]
    if is_worth_retrying(code):
        return (
            "see what killed it (the kernel for want of memory, a person, a scheduler), run again"
        )
    return "see the lines above it"


def error_of(message: Any) -> tuple[str, float | None]:
    """What a rank left in its error file, in torch's format: error and time."""
    if isinstance(message, dict):
        info = message.get("extraInfo") or {}
        stamp = info.get("timestamp")
        text = re.sub(r"^\w+(\.\w+)*Error: ", "", str(message.get("message", "")))
        return text.strip(), float(stamp) if stamp else None
    return str(message).strip(), None


def tail(path: str | Path) -> list[str]:
    """The last lines of a log; none if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def write_record(directory: Path, record: dict[str, Any]) -> Path:
    """Writes the next free number of the run directory's ``failures/``. Raises OSError."""
    folder = directory / "failures"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "time": time.time()}, indent=1)
    number = 1 + max((int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit()), default=0)
    while True:
        path = folder / f"{number:04d}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:  # another node's agent was faster
            number += 1


def write_termination(path: Path, record: dict[str, Any]) -> None:
    """Writes the same where a container's runtime looks, in at most 4096 bytes. Raises OSError."""
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
