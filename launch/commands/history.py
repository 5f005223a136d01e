"""List this user's launches and how they ended, the newest last.

The scheduler is asked for the state of each launch whose end is not recorded.
"""

from __future__ import annotations

import argparse

from launch.contract import Exit, UsageError, say
from launch.history import launch_log
from launch.history.launches import all_launches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "-n", type=int, default=20, metavar="N", help="number of launches (default 20)"
    )
    parser.add_argument(
        "--offline", action="store_true", help="ask no scheduler; show UNKNOWN instead"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints a table."""
    if arguments.n < 1:
        raise UsageError(f"-n must be at least 1, but is {arguments.n}.")
    launches = all_launches()
    if not launches:
        say(f"No launches recorded in {launch_log.path()}.")
        return Exit.DONE
    rows = [("submitted", "run", "scheduler", "nodes", "state", "handle")]
    for launch in launches[-arguments.n :]:
        state = launch.state if arguments.offline else launch.refresh()
        if launch.exit_code:
            state += f" ({launch.exit_code})"
        line = launch.line
        rows.append(
            (
                launch.when,
                launch.run_id,
                line["scheduler"],
                str(line["nodes"]),
                state,
                launch.handle,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())
    return Exit.DONE
