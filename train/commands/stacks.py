"""Print what each rank on this machine does at this moment: its phase and step, and the Python
stacks of its threads, the most recent call first.

The training goes on meanwhile. Only ranks of the same user answer, on Linux.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.command_line import say
from train.exits import Exit, UsageError
from train.json_text import json_text
from train.process.stacks import describe_stacks, stacks_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "directory", nargs="?", type=Path, metavar="RUN",
        help="the directory of a run; default: all runs on this machine",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, metavar="N", help="only this rank")
    parser.add_argument("--json", action="store_true", help="print a list of objects as JSON")


def run(arguments: argparse.Namespace) -> Exit:
    """Prints them."""
    found = stacks_here(arguments.directory)
    ranks = [each["rank"] for each in found]
    if arguments.rank is not None:
        found = [each for each in found if each["rank"] == arguments.rank]
    if arguments.json:
        say(json_text(found))
        return Exit.DONE
    if not ranks:
        which = f"the run {arguments.directory}" if arguments.directory else "a run of yours"
        raise UsageError(
            f"No rank of {which} is at work on this machine; use the machine and the user of its "
            "ranks, or, on Kubernetes, `isorun cluster stacks`."
        )
    if not found:
        raise UsageError(
            f"--rank is {arguments.rank}, but the ranks on this machine are "
            f"{', '.join(map(str, ranks))}."
        )
    say("\n\n".join(describe_stacks(each) for each in found))
    return Exit.DONE
