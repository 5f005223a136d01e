"""The cost of a training loop: isorun beside a bare PyTorch loop and three other frameworks.

Each contender has a process of its own that lives through all rounds, so that no one's imports,
threads or global state touch another's. They take turns of about a third of a second, one at a
time while the others wait, in the order A B C D E and, every other round, E D C B A: whatever
else slows the machine hits all of them alike, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from statistics import median
from typing import Any

from benchmarks.contenders import CONTENDERS, serve
from benchmarks.timing import ENVIRONMENT, machine, median_and_spread, ratios, table


class Process:
    """A contender's process, seen from here."""

    def __init__(self, name: str, sizes: list[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, sizes, theirs), daemon=False)
        self._process.start()

    def go(self) -> None:
        """Lets it work until it has something to say."""
        self._pipe.send("go")

    def answer(self) -> Any:
        """What it says."""
        said = self._pipe.recv()
        if isinstance(said, str):
            raise SystemExit(f"{self.name} failed:\n{said}")
        return said

    def turn(self) -> Any:
        """One turn."""
        self.go()
        return self.answer()

    def end(self) -> None:
        """Ends it, if it has not ended by itself."""
        self._process.join(timeout=5)
        self._process.kill()


def measure(
    processes: list[Process], size: Any
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step by contender and round, and the loss of every step by contender."""
    for process in processes:
        process.turn()  # builds and warms up
    seconds: dict[str, list[float]] = {process.name: [] for process in processes}
    for number in range(size.rounds):
        for process in processes if number % 2 == 0 else reversed(processes):
            seconds[process.name].append(process.turn())
    return seconds, {process.name: process.turn() for process in processes}


def report(size: Any, seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> str:
    """The table of one size."""
    reference, truth = seconds["bare PyTorch"], losses["bare PyTorch"]
    rows = []
    for name, values in seconds.items():
        overhead = [(v - r) * 1e6 for v, r in zip(values, reference, strict=True)]
        off = max(abs(a - b) / b for a, b in zip(losses[name], truth, strict=True))
        rows.append(
            [
                name,
                median_and_spread(values, 3, 1e3),
                "" if values is reference else median_and_spread(overhead, 0),
                median_and_spread(ratios(reference, values), 3),
                f"{losses[name][-1]:.6f}",
                f"{off:.0e}" if off else "0",
            ]
        )
    bare = median(reference) * 1e3
    return table(
        f"### {size.name}: {bare:.2f} ms per bare step; {size.rounds} rounds of {size.steps} steps",
        [
            "",
            "ms per step",
            "µs over bare",
            "bare / contender",
            "last loss",
            "largest difference of a loss",
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
            print(report(size, *measure(processes, size)), flush=True)
    finally:
        for process in processes:
            process.end()


if __name__ == "__main__":
    main()
