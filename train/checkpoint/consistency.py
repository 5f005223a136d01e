"""Whether the files of a run directory are of one run: they repeat some of each other's values.

Each fault is a sentence with both files and both values. Values that earlier versions did not write
are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.checkpoint.damage import DamagedError
from train.checkpoint.loop_state import state_fault
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.data.ledger import AttemptStart, History, StepRecord, read_history, recorded_step
from train.exits import DataError
from train.json_files import is_count, json_lines


def contradictions(directory: RunDirectory) -> list[str]:
    """Compares all files of a run with each other; the faults, [] if there are none. Raises
    ResumeRefusedError if run.json, config.json or finished.json is damaged."""
    run_id = directory.identity("").id
    manifests, finished = manifests_of(directory), directory.finished()
    try:
        history = read_history(directory.ledger) if directory.ledger.exists() else None
    except DataError:
        history = None  # reported with the ledger
    config, attempts = directory.stored_config() or {}, directory.attempts.by_number()
    found: list[str] = []
    for checkpoint, manifest in manifests.items():
        fault = foreign_fault(directory, run_id, checkpoint, manifest)
        found += [fault or own_fault(checkpoint, manifest) or ""]
    found += _attempt_faults(directory, run_id, attempts)
    if history:
        found += _ledger_faults(directory, history, attempts, config)
        steps = {record.step: (record, start) for record, start in history.steps}
        for checkpoint, manifest in manifests.items():
            if recorded := steps.get(manifest.step):
                found += against_record(directory, checkpoint, manifest, recorded)
        found += _metrics_faults(directory, history, steps, finished)
    if finished:
        found += finished_faults(directory, run_id, finished, manifests)
        if history and history.steps and history.steps[-1][0].step == finished["step"]:
            end = {"position": end_position(history.steps[-1][0])}
            path = directory.finished_path
            found += _all_differ(path, finished, directory.ledger, end)
    return [fault for fault in dict.fromkeys(found) if fault]


def manifests_of(directory: RunDirectory) -> dict[Path, Manifest]:
    """The manifests that can be read, oldest first; others are reported as damage."""
    store, found = CheckpointStore(directory.checkpoints), {}
    for step in store.steps():
        try:
            found[store.path(step)] = Manifest.read(store.path(step))
        except (DamagedError, PermissionError):
            continue
    return found


def differs(
    path: Path, name: str, values: Mapping[str, Any], other: Path, expected: Any, *, at: str = ""
) -> str | None:
    """The fault if ``values`` of a file have another value of this name than the ``other`` file."""
    value = values.get(name)
    if value is None or expected is None or value == expected:
        return None
    return f"{path} has {name} {value!r}{at}, but {other} has {expected!r}"


def _all_differ(
    path: Path,
    values: Mapping[str, Any],
    other: Path,
    expected: Mapping[str, Any],
    *,
    at: str = "",
) -> Iterator[str]:
    for name, value in expected.items():
        if fault := differs(path, name, values, other, value, at=at):
            yield fault


def end_position(record: StepRecord) -> int:
    """The position after a step."""
    return record.start_position + record.count


def _progress(manifest: Manifest) -> Mapping[str, Any]:
    progress = manifest.state.get("progress")
    return progress if isinstance(progress, Mapping) else {}


def own_fault(checkpoint: Path, manifest: Manifest) -> str | None:
    """How a manifest contradicts itself, or what it has of another type."""
    progress, path = _progress(manifest), checkpoint / MANIFEST
    if fault := state_fault(manifest.state):
        return f"{path} has {fault}"
    if progress.get("step") != manifest.step:
        return f"{path} is of step {manifest.step}, but its progress is {progress.get('step')!r}"
    position = progress.get("position")
    if not is_count(position) or (position == 0) != (manifest.step == 0):
        return f"{path} is of step {manifest.step}, but has position {position!r}"
    return None


def foreign_fault(
    directory: RunDirectory, run_id: str, checkpoint: Path, manifest: Manifest
) -> str | None:
    """The fault if a checkpoint is not of the run in run.json."""
    return differs(checkpoint / MANIFEST, "run", manifest.state, directory.identity_path, run_id)


def against_record(
    directory: RunDirectory,
    checkpoint: Path,
    manifest: Manifest,
    recorded: tuple[StepRecord, AttemptStart],
) -> Iterator[str]:
    """Compares a checkpoint with what the ledger has for its step."""
    record, start = recorded
    values = {**manifest.state, "position": _progress(manifest).get("position")}
    expected = {
        "position": end_position(record),
        "attempt": start.attempt,
        "seed": start.order.seed,
        "samples": start.order.size,
        "batch": record.count,
    }
    at = f" at step {manifest.step}"
    yield from _all_differ(checkpoint / MANIFEST, values, directory.ledger, expected, at=at)


def _attempt_faults(
    directory: RunDirectory, run_id: str, attempts: Mapping[int, Mapping[str, Any]]
) -> Iterator[str]:
    path = directory.attempts.path
    for number, values in attempts.items():
        if fault := differs(path, "run", values, directory.identity_path, run_id):
            yield fault
        if values.get("attempt") != number:
            yield f"{path} has attempt {values.get('attempt')!r} in line {number}"


def _ledger_faults(
    directory: RunDirectory,
    history: History,
    attempts: Mapping[int, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> Iterator[str]:
    """Compares the ledger with attempts.jsonl and, for the last attempt, with config.json."""
    path, ledger = directory.attempts.path, directory.ledger
    batches = {start.attempt: record.count for record, start in history.steps}
    newest = max(attempts, default=0)
    if attempts and history.starts and history.starts[-1].attempt > newest:
        yield (
            f"{ledger} has attempt {history.starts[-1].attempt}, but {path} ends at attempt "
            f"{newest}"
        )
    for start in {start.attempt: start for start in history.starts}.values():
        expected = {
            "seed": start.order.seed,
            "samples": start.order.size,
            "batch": batches.get(start.attempt),
        }
        values, at = attempts.get(start.attempt, {}), f" in attempt {start.attempt}"
        yield from _all_differ(path, values, ledger, expected, at=at)
        if "resumed_from_step" in values and (values["resumed_from_step"] or 0) != start.step:
            yield (
                f"{path} has attempt {start.attempt} resumed from step "
                f"{values['resumed_from_step'] or 0}, but {ledger} has step {start.step}"
            )
        if start.attempt == newest:
            yield from _config_faults(directory, config, start, batches.get(start.attempt))


def config_faults(directory: RunDirectory, step: int) -> Iterator[str]:
    """Compares config.json with what the ledger has for the last attempt, if that took ``step``,
    from which the run is about to be resumed."""
    recorded = recorded_step(directory.ledger, step)
    if recorded and recorded[1].attempt == directory.attempts.count():
        config = directory.stored_config() or {}
        yield from _config_faults(directory, config, recorded[1], recorded[0].count)


def _config_faults(
    directory: RunDirectory, config: Mapping[str, Any], start: AttemptStart, batch: int | None
) -> Iterator[str]:
    # A later attempt that ended before its first record has another config.
    for section, key, value in (
        ("run", "seed", start.order.seed),
        ("batch", "global_batch_size", batch),
    ):
        stored = config.get(section)
        values = stored if isinstance(stored, Mapping) else {}
        at = f" in attempt {start.attempt}"
        if fault := differs(directory.config_path, key, values, directory.ledger, value, at=at):
            yield fault


def finished_faults(
    directory: RunDirectory,
    run_id: str,
    finished: Mapping[str, Any],
    manifests: Mapping[Path, Manifest],
) -> Iterator[str]:
    """Compares finished.json with run.json and the checkpoints."""
    path = directory.finished_path
    if fault := differs(path, "run", finished, directory.identity_path, run_id):
        yield fault
    own = {p: m for p, m in manifests.items() if not foreign_fault(directory, run_id, p, m)}
    for checkpoint, manifest in own.items():
        if manifest.step > finished["step"]:
            yield (
                f"{path} has step {finished['step']} as the last, but {checkpoint / MANIFEST} has "
                f"step {manifest.step}"
            )
        elif manifest.step == finished["step"]:
            expected = {"position": _progress(manifest).get("position")}
            yield from _all_differ(path, finished, checkpoint / MANIFEST, expected)


def _metrics_faults(
    directory: RunDirectory,
    history: History,
    steps: Mapping[int, tuple[StepRecord, AttemptStart]],
    finished: Mapping[str, Any] | None,
) -> Iterator[str]:
    """Compares metrics.jsonl with the ledger and finished.json; names the first fault of a kind."""
    path, ledger, last = directory.metrics, directory.ledger, -1
    newest = max((start.attempt for start in history.starts), default=0)
    kinds: dict[str, str] = {}
    for row in rows_of(path):
        step, attempt, epoch = row.get("step"), row.get("attempt"), row.get("train/epoch")
        if not isinstance(step, int):
            continue
        if step <= last:
            kinds.setdefault("order", f"{path} has step {step} after step {last}")
        last = max(last, step)
        if isinstance(attempt, int) and attempt > newest:
            text = f"{path} has attempt {attempt} at step {step}, but {ledger} ends at {newest}"
            kinds.setdefault("attempt", text)
        if finished and step > finished["step"]:
            text = f"{path} has step {step}, but {directory.finished_path} has {finished['step']}"
            kinds.setdefault("finished", text)
        if step not in steps:
            continue
        record, start = steps[step]
        if isinstance(attempt, int) and attempt < start.attempt:
            text = f"{path} has attempt {attempt} at step {step}, but {ledger} has {start.attempt}"
            kinds.setdefault("earlier attempt", text)
        passes = end_position(record) / start.order.size
        if isinstance(epoch, float) and not math.isclose(epoch, passes, rel_tol=1e-6):
            text = f"{path} has train/epoch {epoch:g} at step {step}, but {ledger} has {passes:g}"
            kinds.setdefault("epoch", text)
    yield from kinds.values()


def rows_of(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of metrics.jsonl; damaged lines, which the next start moves, are left out."""
    if not path.is_file():
        return
    yield from (row for _, row in json_lines(path) if row is not None)
