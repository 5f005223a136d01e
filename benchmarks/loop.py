"""Overhead of the training loop: isorun compared with plain PyTorch and three other frameworks.

Each contender runs in its own process for all rounds, so that imports, threads and global state do
not interfere. In a round, contenders take turns of a fraction of a second, one at a time, in
alternating order, so that other load affects all of them equally; ratios are computed per round.
A round in which other processes used the CPU is repeated, up to a time limit.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.contenders import CONTENDERS, Trained
from benchmarks.team import Team
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
"""Steps whose losses are compared; later ones differ by accumulated rounding."""


@dataclass
class Result:
    """The measurements of one size."""

    seconds: dict[str, list[float]]
    """Seconds per step, by contender and round."""
    trained: dict[str, Trained]
    """Losses and memory, by contender."""
    rounds: int
    """Total rounds, discarded ones included."""
    others: float
    """Cores that other processes used on average during the counted rounds."""


def measure(teams: list[Team], size: Any) -> Result:
    """Runs all rounds of one size; counts the ``size.rounds`` rounds with the least other load."""
    for team in teams:
        team.turn()  # builds and warms up
    made: list[tuple[float, dict[str, float]]] = []
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline or len(made) < 3:
        others = Others()
        order = teams if len(made) % 2 == 0 else teams[::-1]
        seconds = {team.name: team.turn() for team in order}
        made.append((others.cores(), seconds))
        if sum(cores < QUIET for cores, _ in made) >= size.rounds:
            break
    counted = sorted(made, key=lambda one: one[0])[: size.rounds]
    return Result(
        {t.name: [seconds[t.name] for _, seconds in counted] for t in teams},
        {t.name: t.last() for t in teams},
        len(made),
        mean(cores for cores, _ in counted),
    )


def report(size: Any, result: Result, short: str = "bare", same: int = SAME) -> str:
    """The table of one size; the first contender is the reference, named ``short`` in the
    header."""
    seconds, trained = result.seconds, result.trained
    first = next(iter(seconds))
    reference, truth = seconds[first], trained[first].losses
    rows = []
    for name, values in seconds.items():
        overhead = [(v - r) * 1e6 for v, r in zip(values, reference, strict=True)]
        pairs = zip(trained[name].losses[:same], truth, strict=False)
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
    return table(
        f"### {size.name}: {median(reference) * 1e3:.2f} ms per {short} step, "
        f"{size.threads} thread(s); {len(reference)} of {result.rounds} rounds of {size.steps} "
        f"steps, during which other processes used {result.others:.2f} cores",
        [
            "",
            "ms per step",
            f"µs over {short}",
            f"{short} / contender",
            f"maximum difference of the first {same} losses",
        ],
        rows,
    )


def main() -> None:
    """Runs all sizes and prints a table per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="SIZE", help="size names; default: all")
    parser.add_argument("--contenders", nargs="*", metavar="NAME", help="default: all")
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    from benchmarks.workload import SIZES

    sizes = [size for size in SIZES if not arguments.only or size.name in arguments.only]
    names = [n for n in CONTENDERS if n in (arguments.contenders or CONTENDERS)]
    print(f"# Training loop\n\n{machine()}", flush=True)
    teams = [Team(name, CONTENDERS[name], sizes) for name in names]
    try:
        for size in sizes:
            print(report(size, measure(teams, size)), flush=True)
    finally:
        for team in teams:
            team.end()


if __name__ == "__main__":
    main()
