"""Resolves ``--checkpoint`` to a verified checkpoint, and loads its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint.layout import parse_step_name
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore, DamagedError
from train.config.load import LoadedConfig
from train.exits import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn


def find_checkpoint(loaded: LoadedConfig, which: str) -> Path:
    """The path of the checkpoint that ``--checkpoint WHICH`` names, after a check of its hashes.

    Raises UsageError if there is no such checkpoint, and DataError if it is damaged.
    """
    given = Path(which)
    if which not in ("newest", "best") and not which.isdigit():
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
    return store.path(step)


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


def load_weights(model: nn.Module, checkpoint: Path, loaded: LoadedConfig) -> None:
    """Loads a checkpoint's weights into a full model; the averaged ones if the config has
    ``ema``."""
    from train.checkpoint.state import restore_model

    try:
        restore_model(checkpoint, model, averaged=loaded.config.ema is not None)
    except DamagedError as error:
        raise DataError(f"{error}; choose another with --checkpoint.") from None
