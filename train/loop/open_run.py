"""Finds out which run a directory holds, and where that run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.mirroring import mirror_unreadable, restore_from_mirror
from train.checkpoint.run_directory import RunDirectory, RunIdentity
from train.checkpoint.store import CheckpointStore
from train.config.changes import Difference, allowed_changes
from train.config.load import LoadedConfig
from train.exits import RetryError, RunError

if TYPE_CHECKING:
    from train.strategies.engine import Engine


@dataclass(frozen=True)
class Found:
    """What rank 0 found, and all ranks go by."""

    identity: RunIdentity
    attempt: int
    resume_step: int | None
    """The checkpoint to go on from; None to start at the beginning."""
    notes: list[str]
    """What there is to tell."""
    changes: list[Difference]
    """How the config differs from the one the run was last started with."""


def find_run(
    engine: Engine,
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    *,
    allow_changes: bool,
) -> Found:
    """Rank 0 takes the directory's lock, looks, and restores from the mirror what is not there;
    collective. Raises on every rank what rank 0 met."""
    found: Found | RunError | None = None
    if engine.is_main:
        try:
            found = _look(loaded, directory, changes, allow_changes=allow_changes)
        except RunError as error:
            found = error
        except OSError as error:
            found = RetryError(f"The run directory {directory.path} failed: {error}.")
    found = engine.broadcast(found)
    if isinstance(found, RunError):
        raise found
    assert found is not None
    return found


def _look(
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    *,
    allow_changes: bool,
) -> Found:
    directory.acquire()
    directory.refuse_restart_after_stop()
    directory.stop_file.unlink(missing_ok=True)  # it was meant for an earlier attempt
    store, config = CheckpointStore(directory.checkpoints), loaded.config
    step, notes = store.newest_valid()
    mirror = Mirror(config.checkpoint.mirror) if config.checkpoint.mirror else None
    if mirror and step is None:
        if directory.exists:
            _claim(mirror, directory, config.run.name, notes, needed=True)
        step, told = restore_from_mirror(mirror, store)
        notes += told
        changes = allowed_changes(loaded, directory, allow=allow_changes)
    identity = directory.identity(config.run.name)
    if mirror:
        _claim(mirror, directory, config.run.name, notes, needed=False)
    return Found(identity, directory.attempts() + 1, step, notes, changes)


def _claim(
    mirror: Mirror, directory: RunDirectory, name: str, notes: list[str], *, needed: bool
) -> None:
    """Makes sure that the mirror is this run's; ``needed``: it must be reached now."""
    try:
        mirror.claim(directory.identity(name).id)
    except MirrorError as error:
        if needed:
            raise mirror_unreadable(
                mirror, CheckpointStore(directory.checkpoints), error
            ) from error
        notes.append(f"{mirror.url} cannot be reached now ({error}).")
