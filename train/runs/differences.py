"""What differs between runs: config, code, data and environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_view import Run
from train.code.changes import read as read_changes
from train.config.changes import Difference, stored_differences, with_defaults
from train.config.compose import flatten
from train.config.schema import Config, config_class
from train.data.stored_fingerprint import Parts, digest, parts
from train.json_files import is_count
from train.runs.summary import task_of, value_at
from train.tasks.registry import BUILT_IN, find_task

Rows = dict[str, list[Any]]
"""The value of each run for each name, where they are not all equal."""
_TASK = ("task", "model", "data")
NOT_ENVIRONMENT = (
    "attempt", "run", "seed", "samples", "batch", "time", "resumed_from_step", "code", "changes",
    "ended", "init_from", "dataset", "model_summary",
)  # fmt: skip
"""What a line of attempts.jsonl has besides the environment."""
_TOLERANCE = 1e-2
"""Samples may differ by as much between machines of different kinds."""


@dataclass(frozen=True)
class ConfigRows:
    """Dotted keys whose values differ."""

    semantic: Rows
    """Those that change results."""
    non_semantic: Rows


def config_rows(configs: Sequence[Mapping[str, Any]]) -> ConfigRows:
    """The keys in which configs differ. Keys of a task of the user's own count as changing results:
    its class is not imported."""
    model: type[Config] = Config
    found = _differences(configs, model)
    if any(change.key.partition(".")[0] in _TASK for change in found):
        uses = {task_of(config) for config in configs}
        use = uses.pop() if len(uses) == 1 else None
        if use in BUILT_IN or use in BUILT_IN.values():
            model = config_class(find_task(str(use), "run"))
            found = _differences(configs, model)
    matters: dict[str, bool] = {}
    for change in found:
        matters[change.key] = matters.get(change.key, False) or change.changes_results
    # Where a section is null in one run, its keys are not compared one by one.
    keys = [key for key in matters if not any(key.startswith(f"{other}.") for other in matters)]
    completed = [with_defaults(config, model) for config in configs]
    rows = {key: [_value(config, key) for config in completed] for key in keys}
    return ConfigRows(
        {key: values for key, values in rows.items() if _matters(key, matters)},
        {key: values for key, values in rows.items() if not _matters(key, matters)},
    )


def _differences(configs: Sequence[Mapping[str, Any]], model: type[Config]) -> list[Difference]:
    first, *others = configs
    return [change for other in others for change in stored_differences(other, first, model)]


def _matters(key: str, matters: Mapping[str, bool]) -> bool:
    return any(
        value for other, value in matters.items() if other == key or other.startswith(f"{key}.")
    )


def _value(config: Mapping[str, Any], key: str) -> Any:
    try:
        return value_at(config, key)
    except KeyError:
        return None


def differing(each: Sequence[Mapping[str, Any]]) -> Rows:
    """The dotted names whose values are not the same in all mappings; None where one has none."""
    flat = [flatten(values) for values in each]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = {name: [values.get(name) for values in flat] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def code(run: Run) -> dict[str, Any]:
    """The code of the last attempt, as ``code_of`` gives it."""
    return code_of(run.path, last_attempt(run))


def code_of(directory: Path, attempt: Mapping[str, Any]) -> dict[str, Any]:
    """The versions and the git revision of an attempt, what it changes in each file (lines added
    and removed, and a digest of them), and the changes that are not recorded."""
    number, found = attempt.get("attempt"), attempt.get("code")
    changes = read_changes(directory, number) if is_count(number) else None
    files = {f"changes in {file.path}": str(file) for file in changes.files} if changes else {}
    left_out = {"left out": changes.notes} if changes and changes.notes else {}
    return {**(found if isinstance(found, Mapping) else {}), **files, **left_out}


def environment(run: Run) -> dict[str, Any]:
    """Where the last attempt ran."""
    attempt = last_attempt(run)
    hosts = attempt.get("hosts")
    nodes = {"nodes": len(hosts)} if isinstance(hosts, list) else {}
    return nodes | {k: v for k, v in attempt.items() if k not in NOT_ENVIRONMENT}


def last_attempt(run: Run) -> Mapping[str, Any]:
    """The line of the last attempt; empty before the first."""
    return run.attempts[-1] if run.attempts else {}


def data(runs: Sequence[Run]) -> Rows:
    """The number of samples and the fingerprints of the training data, where they differ."""
    states = [_state(run) for run in runs]
    counts = [
        state.get("samples", last_attempt(run).get("samples"))
        for run, state in zip(runs, states, strict=True)
    ]
    found = differing([{"samples": count} for count in counts])
    prints = [parts(state.get("data")) for state in states]
    exact = [_exact(each) for each in prints]
    if any(each != exact[0] for each in exact):
        found["fingerprint"] = [digest(state.get("data")) for state in states]
    elif name := _other_values(prints):
        each = [(found_parts or {}).get(name, ("", ()))[1] for found_parts in prints]
        found[f"first values of {name}"] = [list(values[:3]) for values in each]
    return found


def has_fingerprint(run: Run) -> bool:
    """Whether a checkpoint of the run has the fingerprint of its training data."""
    return parts(_state(run).get("data")) is not None


def _state(run: Run) -> Mapping[str, Any]:
    """The state in the newest checkpoint that can be read; empty without one."""
    for checkpoint in reversed(run.checkpoints):
        try:
            return Manifest.read(checkpoint.path).state
        except DamagedError:
            continue
    return {}


def _exact(found: Parts | None) -> list[tuple[str, str]] | None:
    """What must be equal on any machine."""
    return None if found is None else [(name, exact) for name, (exact, _) in found.items()]


def _other_values(prints: Sequence[Parts | None]) -> str | None:
    """The first part whose values are not close in all fingerprints."""
    first = prints[0] or {}
    for name, (_, values) in first.items():
        for other in prints[1:]:
            if not _are_close(values, (other or {}).get(name, ("", ()))[1]):
                return name
    return None


def _are_close(values: Sequence[float], others: Sequence[float]) -> bool:
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return len(values) == len(others) and all(
        a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= _TOLERANCE * largest
        for a, b in zip(values, others, strict=True)
    )
