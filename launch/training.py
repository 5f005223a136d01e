"""The training command that a launcher was given, read with training's own command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.cli import parse
from train.config.load import LoadedConfig, load_config
from train.exits import UsageError


def fit_arguments(command: Sequence[str]) -> list[str] | None:
    """What stands after ``-m train`` in a command that trains; None for any other command."""
    words = list(command)
    for at in range(len(words) - 2):
        if words[at : at + 3] == ["-m", "train", "fit"]:
            return words[at + 2 :]
    return None


def training_config(command: Sequence[str]) -> LoadedConfig | None:
    """The config that a command would train; None if it does not train. Raises UsageError."""
    words = fit_arguments(command)
    if words is None:
        return None
    arguments = parse(words)
    return load_config(arguments.config, arguments.overrides, runs=False)


def run_directory(command: Sequence[str]) -> Path | None:
    """Where the run writes; None if that cannot be told."""
    try:
        loaded = training_config(command)
    except UsageError:
        return None
    return loaded.run_directory if loaded else None
