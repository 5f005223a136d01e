"""Show where the time of a run went, over all its attempts, and which part of it was of use.

Reads goodput.jsonl of the run directory. The run may be in progress, finished or killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.checkpoint.damage import refused_files
from train.checkpoint.run_directory import RunDirectory
from train.command_line import say
from train.exits import DataError, Exit, UsageError
from train.goodput.read import FILE, read_goodput
from train.goodput.table import table, to_json
from train.json_text import json_text
from train.numeric_text import finite_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("directory", metavar="RUN", help="the directory of a run")
    parser.add_argument("--json", action="store_true", help="print the values as JSON")
    parser.add_argument(
        "--price-per-hour",
        metavar="PRICE",
        help="price of all machines of the run for one hour; adds its cost and that of lost work",
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints the table, or the JSON."""
    price = _price(arguments.price_per_hour)
    path = Path(arguments.directory)
    with refused_files(path):
        if not RunDirectory(path).exists:
            raise UsageError(f"There is no run in {path}; name the run.dir of one.")
        goodput = read_goodput(path)
        if goodput is None and (path / FILE).exists():
            raise DataError(f"{path / FILE} has no line that can be read; nothing is known of it.")
    if goodput is None:
        raise UsageError(
            f"The run in {path} has no {FILE}: it was started by an earlier version of isorun; "
            "resume it with this version to record its times from then on."
        )
    say(json_text(to_json(goodput, price), indent=1) if arguments.json else table(goodput, price))
    return Exit.DONE


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    price = finite_number(text)
    if price is None or price < 0:
        raise UsageError(
            f"--price-per-hour is {text!r}, which is not a number of at least 0; name the price "
            "without its currency, such as 32.77."
        )
    return price
