"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.paths import path_word, user_path


def add_config_arguments(parser: argparse.ArgumentParser, *, takes_run: bool = False) -> None:
    """``--config FILE`` (repeatable) and ``key=value`` overrides; ``takes_run``: also the directory
    of a run in place of its config files."""
    parser.add_argument(
        "--config",
        action="append",
        type=path_word,
        default=[],
        metavar="FILE",
        help="a YAML config file, or the directory of a run; repeatable, later ones take "
        "precedence",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="RUN or key=value" if takes_run else "key=value",
        help="the directory of a run, in place of its config files; and values that take "
        "precedence over them"
        if takes_run
        else "values that take precedence over the files, such as optim.lr=3e-4",
    )


def config_words(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The config files and the overrides of a command that takes the directory of a run."""
    words = arguments.overrides
    runs = [word for word in words if "=" not in word or _is_run(word)]
    return [*arguments.config, *map(_named, runs)], [word for word in words if word not in runs]


def _named(word: str) -> str:
    """The directory of a run that a word names, as the user has written it, except for ``~``."""
    return str(user_path(word, f"The run is {word!r}")) if word.startswith("~") else word


def _is_run(word: str) -> bool:
    """Whether a word of the form key=value is the directory of a run."""
    try:
        return (Path(word) / "config.json").exists()
    except OSError:  # a value longer than a file name
        return False


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
