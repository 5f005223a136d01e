"""A sweep: the same training once for each combination of values, shared out over nodes.

On each node ``python -m launch.sweep`` starts one run after another, each by an agent of its own:
node r of n takes the runs r, r + n, r + 2n ... A run that fails does not keep the others from being
tried. Which have finished is known to the runs themselves, so the same sweep may be started again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.contract import Exit, RunError, UsageError, is_worth_retrying
from launch.identity import slug
from launch.job import Training, training
from launch.shape import Shape

_LONGEST = 100  # letters of a directory's name
_LARGEST = 1000  # more combinations than these are a slip of the pen


def plan(
    files: Sequence[str], overrides: Sequence[str], check: bool, shape: Shape
) -> tuple[Training, list[list[str]]]:
    """The sweep as a whole, and the overrides of each of its runs, all of them valid. Raises
    UsageError."""
    if shape.min_nodes != shape.max_nodes:
        raise UsageError(
            f"-j has {shape.nnodes} nodes, but those of a sweep do not come and go; name one "
            "number."
        )
    trials = combinations(overrides)
    if len(trials) == 1:
        raise UsageError(
            "Nothing is varied: give at least one override several values, such as "
            "optim.lr=1e-3,3e-3, or use isorun.fit."
        )
    first = training(files, trials[0], check=check, world_size=shape.processes)
    base = _base(first, overrides)
    varied = {word.partition("=")[0] for word in overrides if len(values(word)) > 1}
    placed = [_placed(trial, varied, base, first.name) for trial in trials]
    for trial in placed if check else ():
        training(files, trial, world_size=shape.processes)
    return first, placed


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of the overrides' values, the last one varying fastest. Raises
    UsageError."""
    choices = [[f"{w.partition('=')[0]}={v}" for v in values(w)] for w in overrides]
    for word, found in zip(overrides, choices, strict=True):
        if len(set(found)) < len(found):
            raise UsageError(f"The override {word!r} has the same value twice; name each once.")
    count = 1
    for found in choices:
        count *= len(found)
    if count > _LARGEST:
        raise UsageError(
            f"The overrides make {count:,} combinations, more than {_LARGEST:,}; vary fewer values."
        )
    return [list(trial) for trial in itertools.product(*choices)]


def values(override: str) -> list[str]:
    """``optim.lr=1e-3,3e-3`` has two; commas within brackets and quotes divide nothing."""
    _, equals, text = override.partition("=")
    if not equals:
        return [text]
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def _base(first: Training, overrides: Sequence[str]) -> str:
    given = [word.partition("=")[2] for word in overrides if word.startswith("run.dir=")]
    if given and len(values(f"run.dir={given[-1]}")) > 1:
        raise UsageError(
            f"run.dir is {given[-1]!r}, but each run of a sweep gets a directory of its own in it; "
            "name one."
        )
    return given[-1] if given else str(first.run_directory or Path("runs") / first.name)


def _placed(trial: list[str], varied: set[str], base: str, name: str) -> list[str]:
    """A run's overrides, with a name and a directory that say what is special about it."""
    special = "_".join(word for word in trial if word.partition("=")[0] in varied)
    text = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", special)
    if text != special or len(text) > _LONGEST:  # then it may be that of another run as well
        text = f"{text[:_LONGEST]}-{hashlib.sha256(special.encode()).hexdigest()[:8]}"
    fixed = [word for word in trial if not word.startswith(("run.dir=", "run.name="))]
    run_name = re.sub(r"[=+]", "-", f"{name}_{text}")
    return [*fixed, f"run.name={run_name}", f"run.dir={Path(base) / text}"]


def arguments(job: Training, trials: list[list[str]], shape: Shape, max_restarts: int) -> list[str]:
    """What ``python`` is given on each node."""
    from torchx.specs import macros

    from launch.app import agent_options, literal

    agent_options("off", max_restarts)  # is it a number?
    given = {
        "config": job.config_arguments,
        "trials": trials,
        "max_restarts": max_restarts,
    }
    return [
        "-m", "launch.sweep", "--share", f"{macros.replica_id}/{shape.max_nodes}",
        "--nproc-per-node", str(shape.processes or "auto"),
        *literal([json.dumps(given)]),
    ]  # fmt: skip


class _Runner:
    """Starts the runs of one node and passes a request to stop on to the one in progress."""

    def __init__(self, given: dict[str, Any], processes: str) -> None:
        self._given, self._processes = given, processes
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self, rank: int, nodes: int) -> Exit | int:
        """0 if all went well; else the first code that says to try again, since those runs may
        still succeed, and finished ones are left alone; else the first code."""
        trials = self._given["trials"]
        codes: list[int] = []
        for number in range(rank, len(trials), nodes):
            if self._stopped:
                return Exit.PREEMPTED
            print(f"isorun: run {number + 1} of {len(trials)}: {trials[number][-2]}", flush=True)
            code = self._train(number, trials[number])
            if self._stopped:
                return code
            if code:
                print(f"isorun: run {number + 1} ended with exit code {code}.", file=sys.stderr)
                codes.append(code)
        return next((code for code in codes if is_worth_retrying(code)), codes[0] if codes else 0)

    def _train(self, number: int, overrides: list[str]) -> int:
        command = [
            sys.executable, "-m", "launch.agent",
            "--nproc-per-node", self._processes,
            "--max-restarts", str(self._given["max_restarts"]),
            "--", sys.executable, "-m", "train", "fit", *self._given["config"], *overrides,
        ]  # fmt: skip
        # The sweep's id is all runs' common stem; a run that is born keeps what it gets here.
        stem = os.environ.get("ISORUN_RUN_ID") or slug(overrides[-2].partition("=")[2])
        run_id = f"{stem}-{number + 1}"
        environment = {**os.environ, "ISORUN_RUN_ID": run_id, "WANDB_RUN_ID": run_id}
        # In a session of its own: a signal to all of ours would reach it twice.
        self._child = subprocess.Popen(command, env=environment, start_new_session=True)
        if self._stopped:  # while it was being started
            self._child.terminate()
        code = self._child.wait()
        return 128 - code if code < 0 else code


def main() -> int:
    """``python -m launch.sweep --share RANK/NODES --nproc-per-node N JSON``"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", required=True, metavar="RANK/NODES")
    parser.add_argument("--nproc-per-node", default="auto", metavar="N")
    parser.add_argument("given", metavar="JSON")
    parsed = parser.parse_args()
    rank, _, nodes = parsed.share.partition("/")
    try:
        runner = _Runner(json.loads(parsed.given), parsed.nproc_per_node)
        return int(runner.run(int(rank), int(nodes)))
    except RunError as error:
        print(f"isorun: error: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
