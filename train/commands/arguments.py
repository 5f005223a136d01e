"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE`` (repeatable) and ``key=value`` overrides."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML config file; repeatable, later files take precedence",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values that take precedence over the files, such as optim.lr=3e-4",
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``: the checkpoint of the run to use."""
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best (by checkpoint.keep_best), a step, or the path of a checkpoint; "
        "default: newest",
    )
