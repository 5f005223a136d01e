"""Paths that a user has written."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.exits import UsageError


def expand_home(text: str) -> str:
    """The path with ``~`` replaced by a home directory, which a shell does at the start of a word
    only, so not in ``run.dir=~/x`` and ``--to=~/x``. The rest stays as it is. Raises ValueError for
    a user without a home directory."""
    if not text.startswith("~"):
        return text
    first, slash, rest = text.partition("/")
    try:
        home = str(Path(first).expanduser())
    except RuntimeError:
        raise ValueError(f"there is no home directory for {first}; write the path without ~") from (
            None
        )
    return f"{home}{slash}{rest}"


def user_path(text: str, where: str) -> Path:
    """The path. Raises UsageError for one that cannot be expanded; ``where`` says what has it, such
    as "--checkpoint is '~x'"."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise UsageError(f"{where}, which cannot be expanded: {error}.") from None


def path_argument(text: str) -> Path:
    """The ``type`` of a command's option that takes a path."""
    return Path(path_word(text))


def path_word(text: str) -> str:
    """The same as text, with ``./`` in front if the user has written it."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be expanded: {error}") from None
