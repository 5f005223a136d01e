"""The training command that a launcher was given, read with training's own command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.cli import parse
from train.config.load import LoadedConfig, load_config
from train.exits import RunError


def training_config(command: Sequence[str]) -> LoadedConfig | None:
    """The config of a training command (``python -m train fit --config ...``); None for another
    command. UsageError says what is wrong with its arguments or its config."""
    words = list(command)
    for index in range(len(words) - 1):
        if words[index : index + 2] == ["-m", "train"]:
            arguments = parse(words[index + 2 :])
            if not hasattr(arguments, "config"):
                return None
            return load_config(arguments.config, arguments.overrides, runs=False)
    return None


def run_directory(command: Sequence[str]) -> Path | None:
    """Where the run writes; None if that cannot be told."""
    try:
        loaded = training_config(command)
    except RunError:
        return None
    return loaded.run_directory if loaded else None
