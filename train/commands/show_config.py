"""Print the resolved config, with the origin of each value."""

from __future__ import annotations

import argparse

import yaml

from train.commands.arguments import add_config_arguments
from train.config.compose import flatten
from train.config.load import check, load_config
from train.exits import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--plain", action="store_true", help="print YAML for --config, without origins"
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints one line per value."""
    # What a run needs besides is checked, but not whether run.dir is writable.
    loaded = load_config(arguments.config, arguments.overrides, runs=False)
    check(loaded.config, loaded.composed)
    if arguments.plain:
        print(yaml.safe_dump(loaded.values(), sort_keys=False), end="")
        return Exit.DONE
    lines = [
        (f"{key} = {value!r}", loaded.composed.origin(key))
        for key, value in flatten(loaded.values()).items()
    ]
    width = min(60, max(len(text) for text, _ in lines))
    for text, origin in lines:
        print(f"{text:<{width}}  # {origin}")
    return Exit.DONE
