"""Installs a checkpoint that came from a mirror or from W&B, after its checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import step_name
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.store import CheckpointStore
from train.files import fsync
from train.json_files import read_object

RUN_FILES = ("run.json", "config.json", "attempts.jsonl", "ledger.bin", "metrics.jsonl")
"""The files of a run directory that go with a checkpoint, so that the run can continue."""
RUN = "run"
"""The directory of a received checkpoint that has them."""
OWNER = "run.json"


def install(
    store: CheckpointStore,
    temporary: Path,
    step: int,
    received: Mapping[str, str],
    place: str,
    check: Callable[[Path], object],
) -> None:
    """Commits the checkpoint that was received into ``temporary``, a directory of ``store``, and
    moves those files of its directory ``run`` that the run directory does not have there.

    ``received``: the SHA-256 of each file, by name. ``place``: where it came from. ``check`` gets
    the checkpoint before anything of it is installed, and may change the files in ``run``. Raises
    DamagedError if the files are not those of the manifest, or of another run or step, and what
    ``check`` raises.
    """
    run = store.directory.parent
    manifest = Manifest.read(temporary)
    expected = {name: entry["sha256"] for name, entry in manifest.files.items()}
    own = {name for name in received if not name.startswith(f"{RUN}/")} - {MANIFEST}
    for name in sorted(own | expected.keys()):
        if received.get(name) != expected.get(name):
            raise DamagedError(f"{name} of step {step} in {place} is not that of {MANIFEST}")
    of_run = run / OWNER if (run / OWNER).exists() else temporary / RUN / OWNER
    check_is_of(manifest, f"{place}/{step_name(step)}/{MANIFEST}", step, run_id_in(of_run))
    check(temporary)
    for source in (temporary / RUN).iterdir():
        fsync(source)
        if not os.path.lexists(run / source.name):
            source.rename(run / source.name)
        else:
            source.unlink()
    (temporary / RUN).rmdir()
    fsync(run)
    store.commit(temporary, manifest)


def check_is_of(manifest: Manifest, path: Path | str, step: int, run_id: str | None) -> None:
    """Raises DamagedError if a checkpoint is not of this step and run."""
    of_run = manifest.state.get("run")
    if manifest.step != step:
        raise DamagedError(f"{path} is of step {manifest.step}, not of step {step}")
    if None not in (of_run, run_id) and of_run != run_id:
        raise DamagedError(f"{path} is of the run {of_run}, not of the run {run_id}")


def run_id_in(path: Path) -> str | None:
    """The id in a run.json; None if it cannot be read."""
    try:
        return str(read_object(path, {"id": str})["id"])
    except (OSError, ValueError):
        return None
