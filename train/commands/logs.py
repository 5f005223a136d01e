"""Print the log lines of all ranks of a run, merged by time, each after its rank in brackets.

The times are those of the machine of each rank. Lines without a time, such as those of a
traceback, stay with the line before them. -f prints new lines until the run is no longer in
progress; Ctrl-C ends it with 130.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from train.checkpoint.run_view import Run
from train.exits import Exit, UsageError
from train.output import log
from train.runs.log_files import log_files
from train.runs.log_lines import Line, Selection
from train.runs.log_reader import LogReader
from train.runs.summary import current_condition
from train.visible import visible

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_POLL = 0.3  # seconds
_LOOK = 3.0
"""Seconds between two looks at whether the run is in progress."""
_ACTIVE = ("running", "hung")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("directory", metavar="RUN", help="the run directory")
    parser.add_argument(
        "--rank", type=int, action="append", metavar="N", help="only this rank; repeatable"
    )
    parser.add_argument(
        "--attempt", type=int, metavar="K", help="only this attempt, from 1; -1 for the last"
    )
    parser.add_argument(
        "--level",
        type=str.upper,
        choices=_LEVELS,
        help="only messages of this level and above",
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="print new lines until the run ends"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints the lines."""
    view = Run(arguments.directory)
    ranks = sorted(log_files(view.path))
    if not arguments.follow:
        for rank in arguments.rank or ():
            if rank not in ranks:
                raise UsageError(
                    f"--rank is {rank}, but {arguments.directory} has logs of {_listed(ranks)}."
                )
    selection = Selection(
        _attempt(arguments.attempt, view, follows=arguments.follow),
        logging.getLevelNamesMapping()[arguments.level] if arguments.level else None,
    )
    width = len(str(max(ranks, default=0)))
    with LogReader(view.path, arguments.rank) as reader:
        if arguments.follow:
            _follow(view.path, reader, selection, width)
        else:
            _print(reader.new_lines(at_end=True), selection, width)
    if not ranks and not arguments.follow:
        log(f"{arguments.directory} has no log files.")
    return Exit.DONE


def _attempt(number: int | None, view: Run, *, follows: bool) -> int | None:
    """The number of an attempt, from 1. Raises UsageError for one that the run does not have;
    ``follows``: it may still come."""
    if number is None:
        return None
    count = len(view.attempts)
    if not (1 <= number <= count or -count <= number <= -1 or (follows and number > count)):
        has = f"{count} attempt{'s' if count != 1 else ''}"
        raise UsageError(
            f"--attempt is {number}, but the run has {has}; name one from 1, or -1 for the last."
        )
    return number if number > 0 else count + 1 + number


def _listed(ranks: list[int]) -> str:
    if not ranks:
        return "no rank"
    if ranks == list(range(len(ranks))):
        return "rank 0" if len(ranks) == 1 else f"ranks 0 to {ranks[-1]}"
    return f"rank {', '.join(map(str, ranks))}"


def _print(lines: Iterable[Line], selection: Selection, width: int) -> None:
    write = sys.stdout.write
    for line in lines:
        if selection.takes(line):
            write(f"[{line.rank:>{width}}] {visible(line.text.decode(errors='replace'))}\n")


def _follow(path: Path, reader: LogReader, selection: Selection, width: int) -> None:
    """Prints what there is and what comes, until two looks in a row find no run in progress."""
    idle, looked = 0, -math.inf
    while True:
        now = time.monotonic()
        if now - looked >= _LOOK:
            looked, found = now, current_condition(path)
            idle = 0 if found.state in _ACTIVE else idle + 1
        _print(reader.new_lines(at_end=idle > 1), selection, width)
        sys.stdout.flush()
        if idle > 1:
            break
        time.sleep(_POLL)
    end = f" (exit code {found.end.code})" if found.end else ""
    log(f"the run is not in progress: {found.state}{end}.")
