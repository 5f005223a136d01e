"""Start-up time of the node agent compared with torchrun.

Both start the same two ranks, in turns. The ranks print their start time and end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks.timing import ENVIRONMENT, machine, median_and_spread, ratios, table

# One write call: lines that two ranks print at the same time could be interleaved.
_RANK = "import os, time; os.write(1, f'{time.time()}\\n'.encode())"


def seconds(launcher: list[str], ranks: list[str]) -> tuple[float, float]:
    """Seconds to the start of the last rank, and to the end of the launcher."""
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *ranks],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    ended = time.time()
    return max(float(line) for line in done.stdout.split()) - started, ended - started


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each")
    arguments = parser.parse_args()
    print(machine())
    torchrun: list[tuple[float, float]] = []
    agent: list[tuple[float, float]] = []
    for number in range(arguments.runs + 1):
        pair = (
            seconds(
                ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
                ["--no-python", sys.executable, "-c", _RANK],
            ),
            seconds(["launch.agent", "--nproc-per-node", "2"], ["--", "python", "-c", _RANK]),
        )
        if number:  # the first run fills the disk cache
            torchrun.append(pair[0])
            agent.append(pair[1])
    rows = []
    for what, at in (("ranks' first line", 0), ("end of the launcher", 1)):
        a, b = [t[at] for t in torchrun], [t[at] for t in agent]
        rows.append(
            [what, median_and_spread(a), median_and_spread(b), median_and_spread(ratios(b, a))]
        )
    header = ["from the command to the", "torchrun, s", "agent, s", "agent / torchrun"]
    print(table("Start of two ranks (median ± half the interquartile range)", header, rows))


if __name__ == "__main__":
    main()
