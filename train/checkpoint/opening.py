"""What an attempt compares when it opens a run, so that it uses no file of another run.

See :mod:`train.checkpoint.consistency` for the values that are compared.
"""

from __future__ import annotations

import math
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.checkpoint.consistency import (
    against_record,
    config_faults,
    differs,
    end_position,
    finished_faults,
    foreign_fault,
    manifests_of,
    own_fault,
)
from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.data.ledger import recorded_step
from train.exits import ResumeRefusedError
from train.files import lines_backwards
from train.json_files import parse_object

_REMEDY = "restore the file that is of another run, or choose another run.dir"


def check_checkpoint(directory: RunDirectory, run_id: str, checkpoint: Path) -> None:
    """Compares a checkpoint that is about to be used with run.json, the ledger and config.json.

    Raises DamagedError for a checkpoint of another run or one that contradicts itself, so that it
    is set aside, and ResumeRefusedError where the ledger contradicts it or config.json.
    """
    manifest = Manifest.read(checkpoint)
    fault = foreign_fault(directory, run_id, checkpoint, manifest)
    if fault := fault or own_fault(checkpoint, manifest):
        raise DamagedError(fault)
    recorded = recorded_step(directory.ledger, manifest.step)
    faults = list(against_record(directory, checkpoint, manifest, recorded)) if recorded else []
    if faults := [*faults, *config_faults(directory, manifest.step)]:
        raise ResumeRefusedError(f"{faults[0]}; {_REMEDY}.")


def foreign_checkpoints(
    directory: RunDirectory, run_id: str, store: CheckpointStore
) -> dict[int, str]:
    """The checkpoints of other runs than that of run.json: step to fault.

    Raises ResumeRefusedError if all are: without them the run would start from the beginning,
    although run.json may be the wrong file.
    """
    found, own = {}, False
    for step in store.steps():
        try:
            manifest = Manifest.read(store.path(step))
        except DamagedError:
            continue
        if fault := foreign_fault(directory, run_id, store.path(step), manifest):
            found[step] = fault
        else:
            own = True
    if found and not own:
        raise ResumeRefusedError(f"{found[max(found)]}; {_REMEDY}.")
    return found


def fault_of_run(checkpoint: Path) -> str | None:
    """The fault if a checkpoint is in the directory of another run, or contradicts itself."""
    directory, manifest = RunDirectory(checkpoint.absolute().parents[1]), Manifest.read(checkpoint)
    fault = own_fault(checkpoint, manifest)
    if fault is None and directory.exists:
        fault = foreign_fault(directory, directory.identity("").id, checkpoint, manifest)
    return fault


def check_attempts(directory: RunDirectory, run_id: str) -> None:
    """Raises ResumeRefusedError if the last line of attempts.jsonl is of another run."""
    last = directory.attempts.last()
    if fault := differs(directory.attempts.path, "run", last, directory.identity_path, run_id):
        raise ResumeRefusedError(f"{fault}; {_REMEDY}.")


def finished_run(directory: RunDirectory) -> dict[str, Any] | None:
    """The content of finished.json; None if the run is not complete.

    Raises ResumeRefusedError if it contradicts run.json or the newest checkpoint.
    """
    finished = directory.finished()
    if finished is None or not directory.exists:
        return finished
    run_id = directory.identity("").id
    faults = finished_faults(directory, run_id, finished, manifests_of(directory))
    for fault in faults:
        raise ResumeRefusedError(f"{fault}; {_REMEDY}.")
    return finished


def set_aside_metrics(directory: RunDirectory, step: int) -> list[str]:
    """Renames metrics.jsonl if its newest row up to ``step``, from which the run resumes, is not
    that of the ledger: its rows would become those of this run. Returns a message for the user."""
    path = directory.metrics
    row = _newest_row(path, step)
    recorded = recorded_step(directory.ledger, row["step"]) if row else None
    if row is None or recorded is None:
        return []
    record, start = recorded
    passes = end_position(record) / start.order.size
    if math.isclose(row["train/epoch"], passes, rel_tol=1e-6):
        return []
    aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    path.rename(aside)
    return [
        f"{path} has train/epoch {row['train/epoch']:g} at step {row['step']}, but "
        f"{directory.ledger} has {passes:g}; renamed it to {aside.name}."
    ]


def _newest_row(path: Path, step: int) -> dict[str, Any] | None:
    """The last row of the steps up to ``step`` that has ``train/epoch``."""
    for line in lines_backwards(path) if path.is_file() else ():
        with suppress(ValueError):  # damaged lines are moved later
            row = parse_object(line, {"step": int, "train/epoch": float})
            if row["step"] <= step:
                return row
    return None
