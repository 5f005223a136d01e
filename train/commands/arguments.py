"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE`` (repeatable) and ``key=value`` overrides."""
    _add_config_file(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values that take precedence over the files, such as optim.lr=3e-4",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The same, and the directory of a run in place of its config files."""
    _add_config_file(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="RUN or key=value",
        help="the directory of a run, in place of its config files; and values that take "
        "precedence over them",
    )


def config_words(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The config files and the overrides of a command with ``add_run_arguments``."""
    words = arguments.overrides
    runs = [word for word in words if "=" not in word]
    return [*arguments.config, *runs], [word for word in words if word not in runs]


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``: the checkpoint of the run to use."""
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best (by checkpoint.keep_best), a step, or the path of a checkpoint; "
        "default: newest",
    )
    parser.add_argument(
        "--other-data",
        action="store_true",
        help="accept a config whose data section is not that of the run",
    )


def _add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML config file, or the directory of a run; repeatable, later ones take "
        "precedence",
    )
