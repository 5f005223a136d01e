"""Compare runs: what differs in config, code, data and environment, and their metrics.

The runs are compared with the first. Differences of the config that cannot change results are
listed apart. The last line says from which step on the training losses differ by more than the
tolerance. The exit code is 0 whether or not the runs differ.
"""

from __future__ import annotations

import argparse
import math

from train.checkpoint.damage import refused_files
from train.checkpoint.run_view import Run
from train.exits import Exit, ResumeRefusedError, UsageError
from train.json_text import json_text
from train.runs.table import terminal_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="RUN", help="two or more run directories"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="REL",
        help="relative difference of losses that counts as none (default 1e-5)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(arguments: argparse.Namespace) -> Exit:
    """Prints tables, or JSON."""
    names = arguments.overrides
    if len(names) < 2:
        raise UsageError(
            f"compare needs at least two run directories, but got {len(names)}; name two."
        )
    if not (math.isfinite(arguments.tolerance) and arguments.tolerance >= 0):
        raise UsageError(
            f"--tolerance must be a number that is not negative, but is {arguments.tolerance}."
        )
    runs = [Run(name) for name in names]

    from train.runs.comparison import compare, text  # imports numpy and the config's schema

    for view in runs:
        with refused_files(view.path):
            _ = view.config, view.attempts, view.metrics, view.checkpoints
    found = compare(runs, arguments.tolerance)
    for name, each in zip(names, found.runs, strict=True):
        if each.why:
            raise ResumeRefusedError(
                f"{name} cannot be compared ({each.why}); correct that file, or leave the run out."
            )
    if arguments.json:
        print(json_text(found.to_json(), indent=1))
        return Exit.DONE
    for line in text(found, names, terminal_width()):
        print(line)
    return Exit.DONE
