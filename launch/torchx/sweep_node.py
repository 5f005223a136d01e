"""Executes a node's share of a sweep: one run after another, each with its own agent.

Node r of n takes the runs r, r + n, r + 2n ... A run that fails does not stop the others. Each run
directory records whether its run has finished, so the same sweep can be started again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from launch.contract import (
    RUN_ID,
    WANDB_ID,
    Exit,
    Fields,
    Parser,
    UsageError,
    exit_code_of,
    handled_signals,
    has_fields,
    is_worth_retrying,
    log,
    parse_object,
    python_module,
    say,
    slug,
    whole_number,
)

_SWEEP: Fields = {"config": list, "runs": list, "max_restarts": int}
_RUN: Fields = {"overrides": list}


class _Runner:
    """Runs the share of one node, and forwards stop signals to the current run."""

    def __init__(self, sweep: dict[str, Any], processes: str) -> None:
        self._sweep, self._processes = sweep, processes
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False
        for number in handled_signals():
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self, rank: int, nodes: int) -> int:
        """0 if all runs finished; else the first retryable exit code, since another start may
        finish those runs and skips the finished ones; else the first exit code."""
        runs = self._sweep["runs"]
        codes: list[int] = []
        for number in range(rank, len(runs), nodes):
            if self._stopped:
                return Exit.PREEMPTED
            overrides = runs[number]["overrides"]
            name = _name(overrides)
            say(f"isorun: run {number + 1} of {len(runs)}: run.name={name}")
            code = self._train(number, name, overrides)
            if self._stopped:
                return code
            if code:
                log(f"run {number + 1} ended with exit code {code}.")
                codes.append(code)
        return next((code for code in codes if is_worth_retrying(code)), codes[0] if codes else 0)

    def _train(self, number: int, name: str, overrides: list[str]) -> int:
        command = [
            *python_module("launch.agent"),
            "--nproc-per-node", self._processes,
            "--max-restarts", str(self._sweep["max_restarts"]),
            "--", *python_module("train"), "fit", *self._sweep["config"], *overrides,
        ]  # fmt: skip
        # The id of the sweep and the number of the run; an existing run keeps its own id.
        run_id = f"{os.environ.get(RUN_ID) or slug(name)}-{number + 1}"
        environment = {**os.environ, RUN_ID: run_id, WANDB_ID: run_id}
        # In a new session: a signal to this process group would otherwise reach it twice.
        self._child = subprocess.Popen(command, env=environment, start_new_session=True)
        if self._stopped:  # by a signal during Popen
            self._child.terminate()
        code = self._child.wait()
        return 128 - code if code < 0 else code


def main() -> int:
    """``python -m launch.torchx.sweep_node --share RANK/NODES --nproc-per-node N JSON``"""
    return exit_code_of(_main)


def _main() -> int:
    parser = Parser(prog="python -m launch.torchx.sweep_node", description=__doc__)
    parser.add_argument("--share", required=True, metavar="RANK/NODES")
    parser.add_argument("--nproc-per-node", default="auto", metavar="N")
    parser.add_argument("sweep", metavar="JSON")
    parsed = parser.parse_args()
    rank, nodes = _share(parsed.share)
    return _Runner(_sweep(parsed.sweep), parsed.nproc_per_node).run(rank, nodes)


def _share(text: str) -> tuple[int, int]:
    rank, nodes = (whole_number(part) for part in text.partition("/")[::2])
    if rank is None or nodes is None or rank >= nodes:
        raise UsageError(
            "--share must be RANK/NODES, such as 0/2, with RANK less than NODES, but is "
            f"{text!r} (command line)."
        )
    return rank, nodes


def _sweep(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        sweep = parse_object(text)
        if has_fields(sweep, _SWEEP) and all(has_fields(run, _RUN) for run in sweep["runs"]):
            return sweep
    raise UsageError(
        f"The list of runs is {text[:40]!r} ... (command line), which is not what `torchx run "
        "isorun.sweep` writes; start the sweep with that command."
    )


def _name(overrides: Sequence[str]) -> str:
    given = [word.partition("=")[2] for word in overrides if word.startswith("run.name=")]
    return given[-1] if given else "run"


if __name__ == "__main__":
    sys.exit(main())
