"""Placements of this machine that commands start processes on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from tempfile import TemporaryFile

from train.command_line import python_module
from train.exits import RunError, UsageError, error_of_code
from train.process.child import run_child
from train.process.diagnose import LOST_PEER
from train.strategies.registry import CHOICES

_PLACEMENT = re.compile(r"([0-9]{1,9})(?::(.+))?")
_ERROR = "isorun: error: "


@dataclass(frozen=True)
class Placement:
    """Number of processes, and strategy."""

    processes: int
    strategy: str

    def __str__(self) -> str:
        return (
            f"{self.processes}" if self.strategy == "auto" else f"{self.processes}:{self.strategy}"
        )

    def command(self, name: str, *words: str) -> list[str]:
        """The command line that starts a command of isorun on it."""
        command = [*python_module("train"), name, *words]
        if self.processes == 1:
            return command
        torchrun = [*python_module("torch.distributed.run"), "--standalone", "--no-python"]
        return [*torchrun, f"--nproc-per-node={self.processes}", *command]


def parse(word: str) -> Placement:
    """Parses a placement such as ``2:fsdp2``. Raises UsageError if it is not one."""
    match = _PLACEMENT.fullmatch(word)
    strategy = (match and match[2]) or "auto"
    if match and int(match[1]) >= 1 and (strategy in CHOICES or ":" in strategy):
        return Placement(int(match[1]), strategy)
    raise UsageError(
        f"{word!r} is not a placement; write PROCESSES or PROCESSES:STRATEGY, such as 2:fsdp2, "
        f"where the strategy is one of {', '.join(CHOICES)}, or module.path:Class."
    )


def environment() -> dict[str, str]:
    """The environment of the processes: one thread each, for equal arithmetic on every placement
    and no more threads than cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def failure(placement: Placement, output: str, returncode: int, remedy: str) -> RunError:
    """The error of processes that failed, with their exit code and reason from their output."""
    error = error_in(output)
    why = f": {error.rstrip('.')}" if error else ""
    # torchrun exits with 1; its report has the exit code of the rank.
    codes = [int(code) for code in re.findall(r"exitcode +: (\d+)", output)]
    code = codes[-1] if codes else returncode
    return error_of_code(
        code, f"The run on {placement} ended with exit code {code}{why}; {remedy}."
    )


def error_in(log: str) -> str:
    """The error that a run has printed, in one line; empty if there is none."""
    lines = [line.partition(_ERROR)[2].strip() for line in log.splitlines() if _ERROR in line]
    # Each rank may print the same error; one that lost another rank does not know the cause.
    causes = [line for line in lines if line != LOST_PEER] or lines
    return " ".join(dict.fromkeys(causes))


def result_of(placement: Placement, command: str, *words: str, start: str) -> str:
    """The line of a command's output, run on a placement, that begins with ``start``. Raises
    RunError."""
    with TemporaryFile("w+", errors="replace") as out, TemporaryFile("w+", errors="replace") as err:
        code = run_child(
            placement.command(command, *words), stdout=out, stderr=err, env=environment()
        )
        for file in (out, err):
            file.seek(0)
        for line in out:
            if line.startswith(start):
                return line.removesuffix("\n")
        raise failure(placement, err.read(), code, "fix the cause, then rerun")
