"""Finds out which run a directory holds, and from which checkpoint it resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.artifacts.name import PREFIX, parse_name
from train.artifacts.restore import IDENTITY_FILES, Restored, restore_artifact
from train.checkpoint import dcp
from train.checkpoint.consistency import own_fault
from train.checkpoint.damage import DamagedError, damaged, unusable
from train.checkpoint.manifest import Manifest
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.mirroring import mirror_unreadable, restore_from_mirror
from train.checkpoint.opening import (
    check_attempts,
    check_checkpoint,
    foreign_checkpoints,
    set_aside_metrics,
)
from train.checkpoint.received import RUN
from train.checkpoint.run_directory import RunDirectory, RunIdentity
from train.checkpoint.store import CheckpointStore
from train.checkpoint.weight_source import remove_download
from train.config.changes import Difference, checked_changes
from train.config.load import LoadedConfig
from train.data.ledger import goes_on_at
from train.distributed.collectives import Collectives
from train.exits import RunError
from train.files import write_json
from train.json_files import is_count, read_object


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as rank 0 found it; the same on all ranks."""

    identity: RunIdentity
    number: int
    """Counted from 1 over all starts of the run."""
    resume_step: int | None
    """The step of the checkpoint to resume from; None to start at the beginning."""
    notes: list[str]
    """Warnings for the user, about damaged checkpoints for instance."""
    changes: list[Difference]
    """How the config differs from that of the start before."""
    left_out: int | None = None
    """The position at which the run goes on, where it has gone back to this checkpoint at a spike
    and leaves out the samples up to there."""
    artifact: str | None = None
    """The artifact of W&B that the checkpoint has come from, ``entity/project/name:version``."""


def find_run(
    collectives: Collectives,
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    *,
    allow_changes: bool,
) -> Attempt:
    """Rank 0 locks the directory, looks for the newest valid checkpoint, and fetches it from the
    mirror or from W&B where the directory has none; collective.

    Raises on every rank the RunError that rank 0 got.
    """
    found: Attempt | RunError | None = None
    if collectives.rank == 0:
        try:
            found = _find(loaded, directory, changes, allow_changes=allow_changes)
        except RunError as error:
            found = error
        except OSError as error:
            found = unusable(directory.path, error)
    found = collectives.broadcast_pickled(found)
    if isinstance(found, RunError):
        raise found
    assert found is not None
    return found


def _find(
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    *,
    allow_changes: bool,
) -> Attempt:
    directory.acquire()
    directory.refuse_restart_after_stop()
    directory.stop_file.unlink(missing_ok=True)  # it was meant for an earlier attempt
    store, config = CheckpointStore(directory.checkpoints), loaded.config
    step, notes = _newest_of_run(directory, store)
    mirror = Mirror(config.checkpoint.mirror) if config.checkpoint.mirror else None
    artifact = None

    def check(checkpoint: Path) -> None:
        nonlocal changes
        _check_content(checkpoint)
        changes = _replace_config(loaded, directory, checkpoint / RUN, allow=allow_changes)

    if mirror and step is None:
        if directory.exists:
            _claim(mirror, directory, config.run.name, notes, required=True)
        step, fetched = restore_from_mirror(mirror, store, check)
        notes += fetched
    staging = directory.path / "restore"
    remove_download(staging)  # a killed attempt may have left it
    if config.checkpoint.restore_from and step is None:
        try:
            restored = _restore_artifact(loaded, directory, staging, check)
        finally:
            remove_download(staging)
        step, artifact = restored.step, restored.artifact
        notes.append(f"Restored the checkpoint of step {step} from {PREFIX}{artifact}.")
    identity = directory.identity(config.run.name)
    if mirror:
        _claim(mirror, directory, config.run.name, notes, required=False)
    number = directory.attempts.count() + 1
    position = None if step is None else _left_out(directory, store, step)
    return Attempt(identity, number, step, notes, changes, position, artifact)


def _left_out(directory: RunDirectory, store: CheckpointStore, step: int) -> int | None:
    progress = Manifest.read(store.path(step)).state.get("progress")
    saved = progress.get("position") if isinstance(progress, dict) else None
    if not is_count(saved):  # an error when the state is loaded
        return None
    position, times = goes_on_at(directory.ledger, step, saved)
    return position if times else None


def _restore_artifact(
    loaded: LoadedConfig,
    directory: RunDirectory,
    staging: Path,
    check: Callable[[Path], None],
) -> Restored:
    """Restores the run from the artifact of ``checkpoint.restore_from``; a run that cannot be had
    is an error, never a start from the beginning."""
    source, track = str(loaded.config.checkpoint.restore_from), loaded.config.track
    where = (
        f"checkpoint.restore_from is {source!r} "
        f"({loaded.composed.where('checkpoint.restore_from')})"
    )
    name = parse_name(source, where, project=track.wandb_project, entity=track.wandb_entity)
    return restore_artifact(name, directory.path, staging, where, check, needs=IDENTITY_FILES)


def _newest_of_run(directory: RunDirectory, store: CheckpointStore) -> tuple[int | None, list[str]]:
    """The step of the newest valid checkpoint of the run in ``directory``, and messages."""
    if not directory.exists:
        if store.steps():
            raise damaged(directory.identity_path, "it is missing")
        return store.newest_valid(_check_content)
    run_id = directory.identity("").id
    check_attempts(directory, run_id)
    foreign = [
        f"The checkpoint of step {step} is of another run ({fault}); renamed it to "
        f"{store.quarantine(step).name}."
        for step, fault in foreign_checkpoints(directory, run_id, store).items()
    ]

    def check(checkpoint: Path) -> None:
        _check_content(checkpoint)
        check_checkpoint(directory, run_id, checkpoint)

    step, notes = store.newest_valid(check)
    metrics = [] if step is None else set_aside_metrics(directory, step)
    return step, foreign + notes + metrics


def _check_content(checkpoint: Path) -> None:
    """Raises DamagedError for an index or a state of the loop that cannot be used."""
    dcp.shapes(checkpoint)
    if fault := own_fault(checkpoint, Manifest.read(checkpoint)):
        raise DamagedError(fault)


def _replace_config(
    loaded: LoadedConfig, directory: RunDirectory, received: Path, *, allow: bool
) -> list[Difference]:
    """Compares the config with the stored one that a mirror has, unless the run directory has one,
    and replaces the mirror's by it. Returns the differences.

    Who can write to the mirror chooses the config there, which would name code in a directory of
    this user. Raises ResumeRefusedError for a difference that changes results, unless ``allow``.
    """
    if (stored := directory.stored_config()) is not None:
        return checked_changes(loaded, stored, allow=allow)
    path = received / directory.config_path.name
    try:
        changes = checked_changes(loaded, read_object(path), allow=allow)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise DamagedError(f"{path.name} cannot be read ({error})") from None
    write_json(path, loaded.config.model_dump(mode="json"))
    return changes


def _claim(
    mirror: Mirror, directory: RunDirectory, name: str, notes: list[str], *, required: bool
) -> None:
    """Makes the mirror this run's. With ``required``, a mirror that cannot be reached is an
    error; else it is noted."""
    try:
        mirror.claim(directory.identity(name).id)
    except MirrorError as error:
        if required:
            raise mirror_unreadable(
                mirror, CheckpointStore(directory.checkpoints), error
            ) from error
        notes.append(f"{mirror.url} cannot be reached now ({error}).")
