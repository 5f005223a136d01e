"""Everything that ``launch`` uses of ``train``; no other file of ``launch`` imports ``train``.

Command line       how a training command is written and read
Config             its schema, and the checks that do not need the training's processes
Exit codes         what the end of a process means, and the errors that carry a code
Environment        what a launcher sets for a rank, and where a rank writes its error
Run directory      the files of a run that other programs may read

A launcher must start fast, and the agent runs on every node: modules that import pydantic,
omegaconf or more are imported when one of their names is used for the first time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from train.distributed.world import World, first_host, this_world
from train.exits import (
    ADVICE,
    DataError,
    Exit,
    OutOfMemoryError,
    ResumeRefusedError,
    RetryError,
    RunError,
    UsageError,
    first_line,
    is_worth_retrying,
)
from train.process.error_file import leave
from train.suggest import did_you_mean

if TYPE_CHECKING:
    from train.checkpoint.run_directory import code_version
    from train.checkpoint.store import CheckpointStore
    from train.config.load import LoadedConfig, load_config
    from train.config.load import check as check_config
    from train.data.plan import BatchPlan
    from train.track.wandb_sink import wandb_mode

__all__ = [
    "ADVICE",
    "FAILURES",
    "RUN_FILE",
    "RUN_ID",
    "STOP_DEADLINE",
    "TRAIN",
    "WANDB_GROUP",
    "WANDB_ID",
    "BatchPlan",
    "CheckpointStore",
    "DataError",
    "Exit",
    "LoadedConfig",
    "OutOfMemoryError",
    "ResumeRefusedError",
    "RetryError",
    "RunError",
    "UsageError",
    "World",
    "check_config",
    "code_version",
    "did_you_mean",
    "first_host",
    "first_line",
    "is_worth_retrying",
    "leave",
    "load_config",
    "run_directory",
    "this_world",
    "train_sources",
    "train_version",
    "training_config",
    "wandb_mode",
]

_IMPORTED_WHEN_USED = {
    "BatchPlan": ("train.data.plan", "BatchPlan"),
    "CheckpointStore": ("train.checkpoint.store", "CheckpointStore"),
    "LoadedConfig": ("train.config.load", "LoadedConfig"),
    "check_config": ("train.config.load", "check"),
    "code_version": ("train.checkpoint.run_directory", "code_version"),
    "load_config": ("train.config.load", "load_config"),
    "wandb_mode": ("train.track.wandb_sink", "wandb_mode"),
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _IMPORTED_WHEN_USED[name]
    return getattr(importlib.import_module(module), attribute)


# -- command line ---------------------------------------------------------------------------------

TRAIN = ("-m", "train")
"""The arguments of Python that start ``train``."""


def training_config(command: Sequence[str]) -> LoadedConfig | None:
    """The config of a training command (``python -m train fit --config ...``); None for any other
    command. Raises UsageError if its arguments or its config are wrong."""
    from train.cli import parse
    from train.config.load import load_config

    words = tuple(command)
    for index in range(len(words) - 1):
        if words[index : index + 2] == TRAIN:
            arguments = parse(words[index + 2 :])
            if not hasattr(arguments, "config"):
                return None
            return load_config(arguments.config, arguments.overrides, runs=False)
    return None


def run_directory(command: Sequence[str]) -> Path | None:
    """The run directory of a training command; None if its config cannot be read."""
    try:
        loaded = training_config(command)
    except RunError:
        return None
    return loaded.run_directory if loaded else None


# -- environment ----------------------------------------------------------------------------------

RUN_ID = "ISORUN_RUN_ID"
"""The id that a new run takes; an existing run keeps its own."""
STOP_DEADLINE = "ISORUN_STOP_DEADLINE"
"""Seconds that ranks have to save a checkpoint after a request to stop."""
WANDB_ID = "WANDB_RUN_ID"
WANDB_GROUP = "WANDB_RUN_GROUP"

# -- run directory --------------------------------------------------------------------------------

RUN_FILE = "run.json"
"""The identity of the run: id, name, wandb_id, created."""
FAILURES = "failures"
"""The directory of failure records, which agents write; the only part that ``launch`` writes."""


# -- package --------------------------------------------------------------------------------------


def train_version() -> str:
    """The version of the installed package."""
    return train.__version__


def train_sources() -> Path:
    """The directory of the package's source files."""
    assert train.__file__
    return Path(train.__file__).parent
