"""Takes a checkpoint of isorun from W&B, with the files of its run, into a run directory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from train.artifacts.fetch import Listing, fetch, refused_files
from train.artifacts.references import copy_checkpoint, referred_place
from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import parse_step_name, step_name
from train.checkpoint.manifest import MANIFEST, Manifest, hash_file
from train.checkpoint.received import OWNER, RUN, RUN_FILES, install, run_id_in
from train.checkpoint.store import CheckpointStore
from train.exits import DataError, ResumeRefusedError, UsageError
from train.json_files import shown

IDENTITY_FILES = ("run.json", "config.json", "attempts.jsonl", "ledger.bin")
"""What a run cannot continue without."""
_OTHER = "name another version"


@dataclass(frozen=True)
class Restored:
    """A checkpoint that is now in a run directory."""

    step: int
    artifact: str
    """``entity/project/name:version``."""


def restore_artifact(
    name: str,
    run: Path,
    staging: Path,
    where: str,
    check: Callable[[Path], object] = lambda _: None,
    *,
    needs: Collection[str] = (),
) -> Restored:
    """Downloads the checkpoint in an artifact (``entity/project/name:alias``) and commits it in the
    run directory ``run``, with the files of the run that are missing there.

    ``staging`` is a new directory on the same file system, which the caller removes. ``check`` gets
    the checkpoint before anything is installed, with the files of the run in its directory ``run``,
    and may change these; ``needs``: those that the artifact must have. ``where`` begins messages:
    field and value. Raises UsageError if there is no such checkpoint, DataError if it is damaged,
    ResumeRefusedError if it is of another run than ``run`` holds, RetryError if W&B fails; and the
    RunErrors of ``check``.
    """
    with refused_files(where):
        listing = fetch(name, staging, where, lambda listing: files_of_checkpoint(listing, where))
        step = install_fetched(listing, staging, run, where, check, needs=needs)
    return Restored(step, listing.name)


def install_fetched(
    listing: Listing,
    staging: Path,
    run: Path,
    where: str,
    check: Callable[[Path], object] = lambda _: None,
    *,
    needs: Collection[str] = (),
) -> int:
    """``restore_artifact`` once ``files_of_checkpoint`` are fetched; returns the step."""
    store, files = CheckpointStore(run / "checkpoints"), staging / "files"
    try:
        if place := referred_place(listing.references, where):
            copy_checkpoint(place, files, where)
        if lacking := [name for name in needs if not (files / RUN / name).exists()]:
            raise DamagedError(f"it lacks {RUN}/{lacking[0]}, without which its run is unknown")
        if OWNER in needs and run_id_in(files / RUN / OWNER) is None:
            raise DamagedError(f"its {RUN}/{OWNER} cannot be read")
        return _install(files, store, listing, where, check)
    except DamagedError as error:
        raise DataError(f"{where}, which is damaged ({error}); {_OTHER}.") from None
    finally:
        store.remove_incomplete()


def is_checkpoint(listing: Listing) -> bool:
    """Whether an artifact says that it is a checkpoint."""
    return MANIFEST in listing.sizes


def files_of_checkpoint(listing: Listing, where: str) -> list[str]:
    """The files to download of an artifact that must be a checkpoint."""
    if not is_checkpoint(listing):
        raise UsageError(
            f"{where}, an artifact without {MANIFEST}, so that it is not a checkpoint of isorun; "
            "name one that is."
        )
    for name in sorted(listing.sizes):
        folder, _, plain = name.rpartition("/")
        is_of_run = folder == RUN and plain in RUN_FILES
        if (folder or plain == RUN) and not is_of_run:
            raise DataError(f"{where}, which has {shown(name)}, no file of a checkpoint; {_OTHER}.")
    return sorted(listing.sizes)


def _install(
    files: Path,
    store: CheckpointStore,
    listing: Listing,
    where: str,
    check: Callable[[Path], object],
) -> int:
    manifest = Manifest.read(files)
    step = manifest.step
    if parse_step_name(step_name(step)) != step:
        raise DamagedError(f"its step is {step}")
    own = run_id_in(store.directory.parent / OWNER)
    other = manifest.state.get("run")
    if None not in (own, other) and own != other:
        raise ResumeRefusedError(
            f"{where}, a checkpoint of the run {shown(other)}, but {store.directory.parent} holds "
            f"the run {own!r}; name an artifact of this run, or choose another run.dir."
        )
    temporary = store.begin(step)
    (temporary / RUN).mkdir()
    received = {}
    for source in [path for path in files.rglob("*") if not path.is_dir()]:
        name = str(source.relative_to(files))
        source.rename(temporary / name)
        received[name] = str(hash_file(temporary / name)["sha256"])
    install(store, temporary, step, received, listing.name, check)
    return step
