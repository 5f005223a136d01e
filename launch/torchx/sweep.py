"""A sweep: one training run for each combination of values, planned before it is submitted.

The runs are listed in the job's command line; ``launch.torchx.sweep_node`` executes them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.agent_command import max_restarts_option
from launch.contract import UsageError
from launch.torchx.shape import Shape
from launch.torchx.train_command import TrainCommand, train_command

MODULE = "launch.torchx.sweep_node"
_MAX_NAME = 100  # characters of a run's directory
_MAX_BYTES = 128 * 1024 - 1  # of one argument of a process (MAX_ARG_STRLEN, with a final zero)
_MAX_RUNS = 1000  # more combinations are most likely a typing error


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, checked."""

    name: str
    config_arguments: list[str]
    runs: list[list[str]]
    """The overrides of each run, with ``run.name`` and ``run.dir``."""

    def to_json(self, max_restarts: int) -> str:
        """The last argument of ``sweep_node``."""
        return json.dumps(
            {
                "config": self.config_arguments,
                "runs": [{"overrides": run} for run in self.runs],
                "max_restarts": max_restarts,
            },
            separators=(",", ":"),
        )


def plan(files: Sequence[str], overrides: Sequence[str], check: bool, shape: Shape) -> SweepPlan:
    """The runs of a sweep; with ``check`` the config of each is validated. Raises UsageError."""
    if shape.is_elastic:
        raise UsageError(
            f"-j has {shape.nnodes} nodes, but a sweep cannot be elastic; use a fixed number of "
            "nodes."
        )
    trials = combinations(overrides)
    if len(trials) == 1:
        raise UsageError(
            "No override has several values; give at least one of them, such as "
            "optim.lr=1e-3,3e-3, or use isorun.fit."
        )
    first = train_command(files, trials[0], check=check, world_size=shape.processes)
    base = _base(first, overrides)
    varied = {word.partition("=")[0] for word in overrides if len(values(word)) > 1}
    runs = [_run(trial, varied, base, first.name) for trial in trials]
    for run in runs if check else ():
        train_command(files, run, world_size=shape.processes)
    return SweepPlan(first.name, first.config_arguments, runs)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of the overrides' values; the last override varies fastest. Raises
    UsageError."""
    choices = [[f"{w.partition('=')[0]}={v}" for v in values(w)] for w in overrides]
    for word, found in zip(overrides, choices, strict=True):
        if len(set(found)) < len(found):
            raise UsageError(f"The override {word!r} has the same value twice; remove one.")
    count = 1
    for found in choices:
        count *= len(found)
    if count > _MAX_RUNS:
        raise UsageError(
            f"The overrides have {count:,} combinations, more than the limit of {_MAX_RUNS:,}; "
            "vary fewer values."
        )
    return [list(trial) for trial in itertools.product(*choices)]


def values(override: str) -> list[str]:
    """The values of an override: ``optim.lr=1e-3,3e-3`` has two. Commas inside brackets or quotes
    are part of a value."""
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


def arguments(sweep: SweepPlan, shape: Shape, max_restarts: int) -> list[str]:
    """The arguments of ``python`` on each node. Raises UsageError."""
    from torchx.specs import macros

    from launch.torchx.app import literal

    max_restarts_option(max_restarts)  # checks the number
    (listed,) = literal([sweep.to_json(max_restarts)])
    size = len(listed.encode())
    if size > _MAX_BYTES:
        raise UsageError(
            f"The sweep has {len(sweep.runs):,} runs, and the list of their overrides has {size:,} "
            f"bytes, more than the {_MAX_BYTES:,} of one argument on Linux; vary fewer values, or "
            "set constant values in a config file."
        )
    return [
        "-m", MODULE, "--share", f"{macros.replica_id}/{shape.max_nodes}",
        "--nproc-per-node", str(shape.processes or "auto"),
        listed,
    ]  # fmt: skip


def _base(first: TrainCommand, overrides: Sequence[str]) -> str:
    """The directory that contains the runs' directories."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("run.dir=")]
    if given and len(values(f"run.dir={given[-1]}")) > 1:
        raise UsageError(
            f"run.dir is {given[-1]!r}, but a sweep needs a single directory, in which it makes "
            "one for each run."
        )
    return given[-1] if given else str(first.run_directory or Path("runs") / first.name)


def _run(trial: list[str], varied: set[str], base: str, name: str) -> list[str]:
    """The overrides of a run, with the varied values in its name and its directory."""
    assigned = "_".join(word for word in trial if word.partition("=")[0] in varied)
    text = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", assigned)
    if text != assigned or len(text) > _MAX_NAME:  # not unique then, so a digest is added
        text = f"{text[:_MAX_NAME]}-{hashlib.sha256(assigned.encode()).hexdigest()[:8]}"
    fixed = [word for word in trial if not word.startswith(("run.dir=", "run.name="))]
    run_name = re.sub(r"[=+]", "-", f"{name}_{text}")
    return [*fixed, f"run.name={run_name}", f"run.dir={Path(base) / text}"]
