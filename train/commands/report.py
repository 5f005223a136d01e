"""Write one HTML file about one or several runs: curves, time line, samples, config.

The file opens without a network. With --watch it is served on this machine while the runs train.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.command_line import say
from train.exits import Exit, UsageError
from train.files import read_bytes, refuse_irregular, replace_text

_START = b"<!doctype html>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--to", metavar="FILE", default="report.html", help="output file; default: report.html"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Writes the report and prints its path."""
    from train.report.data import read_run
    from train.report.page import render

    paths = list(dict.fromkeys(arguments.runs))
    target = Path(arguments.to)
    _check_target(target)
    write_report(target, render([read_run(path) for path in paths]))
    say(str(target))
    return Exit.DONE


def _check_target(target: Path) -> None:
    """Refuses to replace a file that is no report, before anything is read."""
    try:
        refuse_irregular(target)
        if target.exists() and not _is_report(target):
            raise UsageError(
                f"--to is {str(target)!r}, which exists and is no report; choose another file."
            )
    except OSError as error:
        raise _unwritable(target, error) from None


def _is_report(target: Path) -> bool:
    head = read_bytes(target)[: len(_START)]
    return not head or head.lower() == _START


def write_report(target: Path, page: str) -> None:
    """Writes a page atomically. Raises UsageError if it cannot be written."""
    try:
        replace_text(target, page)
    except OSError as error:
        raise _unwritable(target, error) from None


def _unwritable(target: Path, error: OSError) -> UsageError:
    return UsageError(
        f"--to is {str(target)!r}, which cannot be written: {error.strerror or error}; choose "
        "another file."
    )
