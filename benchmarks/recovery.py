"""Recovery time after the kill of a rank, and start-up time of new and resumed runs.

Times come from the run directory: rows of metrics.jsonl have the completion time of their step,
lines of attempts.jsonl the time at which the run was open.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.team import free_port
from benchmarks.timing import median_and_spread, ratios, table
from train.checkpoint.store import CheckpointStore

EVERY = 20
"""Steps between checkpoints."""

_RUN = [
    "fit", "--config", "configs/text.yaml", "length.steps=100000", "track.log_every_steps=1",
    "evaluate.at_end=false", "evaluate.every_steps=null", "track.console=plain",
    f"checkpoint.every_steps={EVERY}",
]  # fmt: skip


class Started:
    """A run in the background, in its own session."""

    def __init__(self, directory: Path, *overrides: str, ranks: int = 1) -> None:
        self.directory, self.at = directory, time.time()
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += [
                "torch.distributed.run", "--max-restarts", "1", "--nproc-per-node", str(ranks),
                "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m",
            ]  # fmt: skip
        command += ["train", *_RUN, f"run.dir={directory}", *overrides]
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._said = directory.with_suffix(".log")
        with self._said.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Polls until the condition is true, and returns its value; exits on a timeout or if the
        run ends."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self._said.read_text().splitlines()[-20:])
                raise SystemExit(f"the run in {self.directory} ended or timed out:\n{tail}")
            time.sleep(0.02)
        return found

    def rows(self, attempt: int) -> list[dict[str, Any]]:
        """The metrics rows of an attempt so far."""
        found = _lines(self.directory / "metrics.jsonl")
        return [row for row in found if row["attempt"] == attempt and "train/loss" in row]

    def attempt(self, number: int) -> dict[str, Any]:
        """The line of an attempt in attempts.jsonl; the first is 1."""
        return _lines(self.directory / "attempts.jsonl")[number - 1]

    def rank(self, wanted: int) -> int:
        """The process id of a rank: torchrun's child with that RANK."""
        import psutil

        for child in psutil.Process(self._process.pid).children():
            if child.environ().get("RANK") == str(wanted):
                return int(child.pid)
        raise SystemExit(f"there is no rank {wanted}")

    def kill(self) -> None:
        """Kills the run and all its child processes."""
        import psutil

        below = psutil.Process(self._process.pid).children(recursive=True)
        for process in [self._process, *below]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()
        psutil.wait_procs(below)


@contextmanager
def started(directory: Path, *overrides: str, ranks: int = 1) -> Iterator[Started]:
    """A context manager that starts a run and kills it at exit."""
    run = Started(directory, *overrides, ranks=ranks)
    try:
        yield run
    finally:
        run.kill()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON lines file, which may still grow."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]


def recovery(repeats: int, *, quick: bool = False) -> None:
    """Prints a table: rank 1 of 2 is killed at a random step, and torchrun restarts both."""
    from statistics import mean

    strategies = ["ddp"] if quick else ["ddp", "fsdp2", "zero2"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(repeats):
            for name in strategies:
                path = Path(directory, f"{name}-{repeat}")
                found[name].append(_recover(path, name, chance.random()))
                shutil.rmtree(path)
    rows = [
        [
            name,
            median_and_spread([one["open"] for one in times]),
            median_and_spread([one["step"] for one in times]),
            median_and_spread([one["caught up"] for one in times]),
            f"{mean(one['again'] for one in times):.0f}",
        ]
        for name, times in found.items()
    ]
    header = [
        "strategy, x2", "run open, s", "next step, s",
        "caught up, s", "repeated steps",
    ]  # fmt: skip
    print(
        table(
            f"### From kill -9 of one rank, in {repeats} run(s) each; torchrun --max-restarts 1, "
            f"a checkpoint every {EVERY} steps",
            header,
            rows,
        ),
        flush=True,
    )


def _recover(path: Path, strategy: str, chance: float) -> dict[str, float]:
    """Kills a rank of one run; returns seconds from the kill, and the number of repeated steps."""
    with started(path, f"strategy={strategy}", "track.wandb=disabled", ranks=2) as run:
        store = CheckpointStore(path / "checkpoints")
        run.wait(store.steps)
        rows = run.rows(1)
        time.sleep(chance * 1.5)  # a random time within steps and between checkpoints
        os.kill(run.rank(1), signal.SIGKILL)
        killed = time.time()
        # Read now: the next attempt removes the rows of the steps that it repeats.
        rows = run.rows(1)
        last = max(row["step"] for row in rows)
        first = run.wait(lambda: run.rows(2))[0]
        again = run.wait(lambda: [row for row in run.rows(2) if row["step"] >= last])[0]
        attempt = run.attempt(2)
        if attempt["resumed_from_step"] not in range(EVERY, last + 1):
            raise SystemExit(
                f"the run resumed from step {attempt['resumed_from_step']} after step {last}"
            )
        return {
            "open": attempt["time"] - killed,
            "step": first["time"] - killed,
            "caught up": again["time"] - killed,
            "again": last - attempt["resumed_from_step"],
        }


def resume(repeats: int) -> None:
    """Prints a table: seconds from the command to the first new step, with and without a
    checkpoint, measured in turns."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for ranks, strategy in ((1, "auto"), (2, "ddp"), (2, "fsdp2"), (2, "zero2")):
            here = Path(directory, f"{strategy}-{ranks}")
            fresh, resumed = _first_steps(here, strategy, ranks, repeats)
            name = f"isorun {'' if strategy == 'auto' else strategy + ' '}x{ranks}"
            rows.append(
                [
                    name,
                    median_and_spread(fresh),
                    median_and_spread(resumed),
                    median_and_spread([b - a for a, b in zip(fresh, resumed, strict=True)]),
                    median_and_spread(ratios(resumed, fresh)),
                ]
            )
    header = ["", "a new run, s", "resumed, s", "difference, s", "resumed / new"]
    print(
        table("### From the command to the first new step, without and with a checkpoint",
              header, rows),
        flush=True,
    )  # fmt: skip


def _first_steps(
    here: Path, strategy: str, ranks: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of new and of resumed runs."""
    overrides = [f"strategy={strategy}", "track.wandb=disabled"]
    begun = here / "begun"
    with started(begun, *overrides, ranks=ranks) as run:  # also fills the disk cache
        run.wait(CheckpointStore(begun / "checkpoints").steps)
    fresh, resumed = [], []
    for repeat in range(repeats):
        with started(here / f"new-{repeat}", *overrides, ranks=ranks) as run:
            fresh.append(run.wait(lambda: run.rows(1))[0]["time"] - run.at)
        copy = here / f"resumed-{repeat}"
        shutil.copytree(begun, copy)
        with started(copy, *overrides, ranks=ranks) as run:
            row = run.wait(lambda: run.rows(2))[0]
            if row["step"] <= EVERY:
                raise SystemExit(
                    f"the run in {copy} did not resume: its first step is {row['step']}"
                )
            resumed.append(row["time"] - run.at)
        for path in (here / f"new-{repeat}", copy):
            shutil.rmtree(path)
    return fresh, resumed
