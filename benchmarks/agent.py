"""From the command to the ranks' first line: the node agent beside torchrun.

Both start the same two ranks, which only say when they began, in turns; and both end with them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks.timing import ENVIRONMENT, machine, median_and_spread, ratios, table

# In one piece: two ranks that print at once may mix what they say with each other's ends of lines.
_RANK = "import os, time; os.write(1, f'{time.time()}\\n'.encode())"


def seconds(launcher: list[str], ranks: list[str]) -> tuple[float, float]:
    """Until the last rank began, and until the launcher ended."""
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
        if number:  # the first fills the disk cache
            torchrun.append(pair[0])
            agent.append(pair[1])
    rows = []
    for what, at in (("ranks' first line", 0), ("end of the launcher", 1)):
        a, b = [t[at] for t in torchrun], [t[at] for t in agent]
        rows.append(
            [what, median_and_spread(a), median_and_spread(b), median_and_spread(ratios(b, a))]
        )
    header = ["from the command to the", "torchrun, s", "agent, s", "agent / torchrun"]
    print(table("Start of two ranks (median ± half the quartiles' distance)", header, rows))


if __name__ == "__main__":
    main()
