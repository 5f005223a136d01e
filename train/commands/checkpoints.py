"""Resolves ``--checkpoint`` to a verified checkpoint of this config, and loads its weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from train.artifacts.runs import ReceivedRuns, received_runs
from train.checkpoint.damage import DamagedError, refused_files
from train.checkpoint.layout import parse_step_name
from train.checkpoint.opening import fault_of_run
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.commands.arguments import config_words
from train.config.changes import differences, listed, without_effect
from train.config.load import LoadedConfig, load_config
from train.distributed.world import this_world
from train.exits import DataError, ResumeRefusedError, UsageError
from train.numeric_text import whole_number
from train.output import log
from train.paths import user_path

if TYPE_CHECKING:
    from torch import nn

    from train.tasks.base import Task

_MODEL = ("task", "model", "ema")


@contextmanager
def local_checkpoint(
    arguments: argparse.Namespace,
) -> Iterator[tuple[LoadedConfig, str, ReceivedRuns]]:
    """The config of a command and its ``--checkpoint``, with artifacts of W&B downloaded for as
    long as the context is open."""
    files, overrides = config_words(arguments)
    with received_runs(files, arguments.checkpoint, overrides) as (files, which, received):
        loaded = load_config(files, overrides, runs=False, received=received.artifacts)
        yield loaded, which, received


def find_checkpoint(
    loaded: LoadedConfig, which: str, *, other_data: bool = False, used: Sequence[str] = ()
) -> Path:
    """The path of the checkpoint that ``--checkpoint WHICH`` names, after a check of its hashes.

    ``used``: the sections and fields that the command uses. Overrides of others that differ from
    the run's config get a warning.

    Raises UsageError if there is no such checkpoint, DataError if it is damaged, and
    ResumeRefusedError if its run has another model, or other data or another seed unless
    ``other_data``.
    """
    with refused_files(loaded.run_directory):
        return _find(loaded, which, other_data=other_data, used=used)


def _find(loaded: LoadedConfig, which: str, *, other_data: bool, used: Sequence[str]) -> Path:
    given = user_path(which, f"--checkpoint is {which!r}")
    if which not in ("newest", "best") and whole_number(which) is None:
        if not (given / "manifest.json").exists():
            raise UsageError(
                f"--checkpoint is {which!r}, which is not newest, best, a step, or the path of a "
                "checkpoint; set it to one of these."
            )
        named = parse_step_name(given.name)
        if named is None:
            raise UsageError(
                f"--checkpoint is {str(given)!r}, but the name of a committed checkpoint is "
                "step-<12 digits>; name another."
            )
        store, step = CheckpointStore(given.parent), named
    else:
        directory = RunDirectory(loaded.run_directory)
        store = CheckpointStore(directory.checkpoints)
        step = _choose(store, loaded, which)
    problems = store.problems(step)
    if problems:
        raise DataError(
            f"The checkpoint {store.path(step)} is damaged: {'; '.join(problems)}; "
            "choose another with --checkpoint."
        )
    if fault := fault_of_run(store.path(step)):
        raise DataError(f"{fault}; choose another with --checkpoint.")
    _check_config(loaded, store.path(step), other_data=other_data, used=used)
    return store.path(step)


def _check_config(
    loaded: LoadedConfig, checkpoint: Path, *, other_data: bool, used: Sequence[str]
) -> None:
    """Compares the config with that of the checkpoint's run, where its directory is there."""
    stored = RunDirectory(checkpoint.absolute().parents[1]).stored_config()
    if stored is None:
        return
    changes = [change for change in differences(loaded.config, stored) if change.changes_results]
    # A task of a notebook has another name in the module that other processes import.
    task = stored.get("task")
    of_notebook = isinstance(task, dict) and str(task.get("use")).startswith("__main__:")
    model = [
        change
        for change in changes
        if change.key.partition(".")[0] in _MODEL and not (change.key == "task.use" and of_notebook)
    ]
    if model:
        raise ResumeRefusedError(
            f"The run of the checkpoint {checkpoint} has another config, and these differences "
            f"change the model:\n{listed(model, loaded.composed)}\n"
            "Undo them, or name a checkpoint of a run with this config."
        )
    # Data may be split by random numbers, which are those of the seed.
    data = [c for c in changes if c.key == "run.seed" or c.key.partition(".")[0] == "data"]
    if data and not other_data:
        raise ResumeRefusedError(
            f"The run of the checkpoint {checkpoint} has other data or another seed, so that what "
            f"it was trained on may be evaluated:\n{listed(data, loaded.composed)}\n"
            "Undo these differences, or add --other-data."
        )
    unused = without_effect(loaded, stored, ("run.dir", *used)) if used else []
    if unused and this_world().rank == 0:
        described = [f"{c.key} ({c.now!r}; the run has {c.before!r})" for c in unused]
        log(f"warning: These overrides have no effect on this command: {', '.join(described)}.")


def _choose(store: CheckpointStore, loaded: LoadedConfig, which: str) -> int:
    steps = store.steps()
    if not steps:
        raise UsageError(
            f"There is no checkpoint in {store.directory} (run.dir is "
            f"{str(loaded.run_directory_as_set)!r}); train with `{loaded.command('fit')}` first."
        )
    if which == "newest":
        return steps[-1]
    if which == "best":
        keep_best = loaded.config.checkpoint.keep_best
        if keep_best is None:
            raise UsageError(
                "--checkpoint is best, but checkpoint.keep_best is not set; set "
                "checkpoint.keep_best.metric and checkpoint.keep_best.mode."
            )
        best = store.best(keep_best.metric, keep_best.mode)
        if not best:
            raise UsageError(
                f"No checkpoint in {store.directory} has an evaluation with the metric "
                f"{keep_best.metric!r} (checkpoint.keep_best.metric); name a step instead."
            )
        return best[0]
    if int(which) not in steps:
        raise UsageError(
            f"There is no checkpoint of step {which} in {store.directory}; choose one of the steps "
            f"{', '.join(map(str, steps))}."
        )
    return int(which)


def load_full_model(task: Task, checkpoint: Path, loaded: LoadedConfig) -> nn.Module:
    """The task's model with a checkpoint's weights, in this process; the averaged ones if the
    config has ``ema``."""
    from train.checkpoint.state import model_shapes, restore_model
    from train.strategies.meta_init import build_full_model

    try:
        model = build_full_model(task, loaded.config.run.seed, model_shapes(checkpoint))
        restore_model(checkpoint, model, averaged=loaded.config.ema is not None)
    except DamagedError as error:
        raise DataError(f"{error}; choose another with --checkpoint.") from None
    return model
