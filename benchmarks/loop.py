"""The cost of a training loop: isorun beside a bare PyTorch loop and three other frameworks.

Each contender has a process of its own that lives through all rounds, so that no one's imports,
threads or global state touch another's. They take turns of a fraction of a second, one at a time
while the others wait, in the order A B C ... and, every other round, backwards: whatever else
slows the machine hits all of them alike, and ratios are taken within a round. A round in which
other programs used the processor is made again, up to a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.contenders import CONTENDERS, serve
from benchmarks.timing import (
    ENVIRONMENT,
    QUIET,
    Others,
    machine,
    median_and_spread,
    ratios,
    table,
)

LIMIT = 60.0
"""Seconds for the rounds of one size."""


SAME = 100
"""Steps whose losses are compared: rounding grows from step to step."""


class Process:
    """A contender's process, seen from here."""

    def __init__(self, name: str, sizes: list[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, sizes, theirs), daemon=False)
        self._process.start()

    def turn(self, go_on: bool = True) -> Any:
        """Lets it work until it has something to say, and returns that."""
        self._pipe.send(go_on)
        said = self._pipe.recv()
        if isinstance(said, str):
            raise SystemExit(f"{self.name} failed:\n{said}")
        return said

    def end(self) -> None:
        """Ends it, if it has not ended by itself."""
        self._process.join(timeout=5)
        self._process.kill()


@dataclass
class Result:
    """What was measured of one size."""

    seconds: dict[str, list[float]]
    """Per step, by contender and round."""
    losses: dict[str, list[float]]
    """Of every step, by contender."""
    rounds: int
    """Rounds made, the ones that do not count included."""
    others: float
    """Cores that other programs kept busy during the rounds that count."""


def measure(processes: list[Process], size: Any) -> Result:
    """All rounds of one size; of more rounds than wanted the quietest count, whatever came out."""
    for process in processes:
        process.turn()  # builds and warms up
    made: list[tuple[float, dict[str, float]]] = []
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline or len(made) < 3:
        others = Others()
        order = processes if len(made) % 2 == 0 else processes[::-1]
        seconds = {process.name: process.turn() for process in order}
        made.append((others.cores(), seconds))
        if sum(cores < QUIET for cores, _ in made) >= size.rounds:
            break
    counted = sorted(made, key=lambda one: one[0])[: size.rounds]
    return Result(
        {p.name: [seconds[p.name] for _, seconds in counted] for p in processes},
        {p.name: p.turn(go_on=False) for p in processes},
        len(made),
        mean(cores for cores, _ in counted),
    )


def report(size: Any, result: Result) -> str:
    """The table of one size."""
    seconds, losses = result.seconds, result.losses
    reference, truth = seconds["bare PyTorch"], losses["bare PyTorch"]
    rows = []
    for name, values in seconds.items():
        overhead = [(v - r) * 1e6 for v, r in zip(values, reference, strict=True)]
        pairs = zip(losses[name][:SAME], truth, strict=False)
        off = max(abs(a - b) / b for a, b in pairs)
        rows.append(
            [
                name,
                median_and_spread(values, 3, 1e3),
                "" if values is reference else median_and_spread(overhead, 0),
                median_and_spread(ratios(reference, values), 3),
                f"{off:.0e}" if off else "0",
            ]
        )
    bare = median(reference) * 1e3
    return table(
        f"### {size.name}: {bare:.2f} ms per bare step, {size.threads} thread(s); "
        f"{len(reference)} of {result.rounds} rounds of {size.steps} steps, during which others "
        f"used {result.others:.2f} cores",
        [
            "",
            "ms per step",
            "µs over bare",
            "bare / contender",
            f"largest difference of the first {SAME} losses",
        ],
        rows,
    )


def main() -> None:
    """Runs all sizes and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="SIZE", help="sizes by name; default: all")
    parser.add_argument("--contenders", nargs="*", metavar="NAME", help="default: all")
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    from benchmarks.workload import SIZES

    sizes = [size for size in SIZES if not arguments.only or size.name in arguments.only]
    names = [n for n in CONTENDERS if n in (arguments.contenders or CONTENDERS)]
    print(f"# Training loop\n\n{machine()}", flush=True)
    processes = [Process(name, sizes) for name in names]
    try:
        for size in sizes:
            print(report(size, measure(processes, size)), flush=True)
    finally:
        for process in processes:
            process.end()


if __name__ == "__main__":
    main()
