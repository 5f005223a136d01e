"""List the launches of this user, and what became of them, the newest last.

Of those whose end is not known yet the scheduler is asked, of each once.
"""

from __future__ import annotations

import argparse

from launch.contract import Exit, UsageError
from launch.history import ledger
from launch.history.launches import all_launches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "-n", type=int, default=20, metavar="N", help="how many, the newest (default 20)"
    )
    parser.add_argument(
        "--offline", action="store_true", help="ask no scheduler; what is not known is UNKNOWN"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints a table."""
    if arguments.n < 1:
        raise UsageError(f"-n must be at least 1, but is {arguments.n}.")
    launches = all_launches()
    if not launches:
        print(f"Nothing was launched yet ({ledger.path()}).")
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
        print("  ".join(cells).rstrip())
    return Exit.DONE
