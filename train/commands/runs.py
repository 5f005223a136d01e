"""List the runs below directories: their state, step, metrics, placement and last exit.

Searches the directories (default: runs) up to 6 levels deep. Words key=value select the runs whose
config has a value, such as optim.lr=1e-3. Runs are sorted by the last time they wrote something,
the newest last. An empty list is no error.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from train.command_line import key_value
from train.exits import Exit, UsageError
from train.json_text import json_text
from train.runs import columns
from train.runs.find import find_runs
from train.runs.state import STATES
from train.runs.summary import summarize
from train.runs.table import drawn, terminal_width

_DEFAULT = "runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="DIR or key=value",
        help="directories that hold runs (default: runs); and config values of the runs to list",
    )
    parser.add_argument(
        "--sort",
        nargs="?",
        default="-age",
        const="",
        metavar="COLUMN",
        help=f"{', '.join(columns.COLUMNS)}; with - before it from the largest to the smallest "
        "(default -age)",
    )
    for name in columns.COLUMNS:  # argparse takes the value of `--sort -age` for an option
        parser.add_argument(
            f"-{name}", dest="sort", action="store_const", const=f"-{name}", help=argparse.SUPPRESS
        )
    parser.add_argument(
        "--state",
        action="append",
        default=[],
        help=f"only runs in this state; repeatable: {', '.join(STATES)}",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs whose config has this value; repeatable, and the same as the word alone",
    )
    parser.add_argument(
        "--task", help="only runs of this task: a built-in name, a dotted path or a class name"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")


def run(arguments: argparse.Namespace) -> Exit:
    """Prints a table, or JSON."""
    words = arguments.overrides
    named = [word for word in words if "=" not in word or Path(word).is_dir()]
    conditions = [
        _condition(word)
        for word in (*arguments.where, *(word for word in words if word not in named))
    ]
    places = [Path(word) for word in named or [_DEFAULT]]
    if not named and not places[0].is_dir():
        raise UsageError(
            f"The working directory has no directory {_DEFAULT}; name directories that hold runs."
        )
    columns.ordered([], arguments.sort)
    columns.in_states([], arguments.state)
    runs = [summarize(path) for path in find_runs(places)]
    there = bool(runs)
    for key, value in conditions:
        runs = columns.where(runs, key, value)
    if arguments.task:
        runs = columns.of_task(runs, arguments.task)
    runs = columns.ordered(columns.in_states(runs, arguments.state), arguments.sort)
    now = time.time()
    if arguments.json:
        print(json_text([found.to_json(now) for found in runs], indent=1))
        return Exit.DONE
    if not runs:
        where = ", ".join(map(str, places))
        print(f"No run in {where} matches." if there else f"There is no run in {where}.")
        return Exit.DONE
    reasons = [[f"{found.path}: {found.why}"] for found in runs if found.why]
    for line in columns.lines(runs, now, terminal_width()) + drawn(reasons, None):
        print(line)
    return Exit.DONE


def _condition(word: str) -> tuple[str, str]:
    """The key and the value of a condition. Raises UsageError."""
    pair = key_value(word)
    if pair is None:
        raise UsageError(f"--where is {word!r}, which is not of the form key=value.")
    return pair
