"""Starts a run from existing weights: finds, compares and loads what ``init_from`` names.

This happens in an attempt that starts at step 0 only; a resumed run has its weights in its own
checkpoint. Each rank reads its own shards, so that no rank holds the model in full, and the weights
are bitwise the same on any placement.
"""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.artifacts.name import PREFIX, is_artifact, parse_name
from train.artifacts.weights import artifact_weights
from train.checkpoint.damage import DamagedError
from train.checkpoint.init_from_config import InitFromConfig
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.weight_match import Entry, Match, compare
from train.checkpoint.weight_source import WeightSource, find_source, remove_download
from train.config.load import LoadedConfig
from train.distributed.collectives import Collectives
from train.distributed.shard import Shard, names_of_tensors
from train.exits import RetryError, RunError, UsageError, first_line
from train.optim.ema import Ema
from train.setup.find_run import Attempt
from train.setup.join import Joined
from train.strategies.base import Strategy

_log = logging.getLogger("train")
_SHOWN, _LOGGED = 12, 10_000
"""Names per kind of difference, in messages and in the log file."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run is about to start from, the same on all ranks."""

    config: InitFromConfig
    source: WeightSource
    where: str
    """The field, its value and its origin."""
    download: Path
    """Where a mirror's copy or an artifact is until it is loaded."""
    notes: list[str]
    """Warnings for the user."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    text: str
    """A line for the user."""
    notes: list[str]
    """Warnings for the user."""
    record: dict[str, Any]
    """For attempts.jsonl, as JSON values."""


def find_initial_weights(
    stack: ExitStack, loaded: LoadedConfig, directory: RunDirectory, joined: Joined
) -> InitialWeights | None:
    """Rank 0 finds, checks and, from a mirror or W&B, downloads the source of the initial weights;
    collective. None without ``init_from``, and for a run that resumes.

    Raises on every rank the RunError that rank 0 got, and UsageError where a rank does not see the
    files.
    """
    config, collectives = loaded.config.init_from, joined.engine.collectives
    download = directory.path / "init_from"
    if collectives.rank == 0:
        remove_download(download)
        stack.callback(remove_download, download)
    if config is None or joined.attempt.resume_step is not None:
        return None
    where = f"init_from.source is {config.source!r} ({loaded.composed.where('init_from.source')})"
    found: WeightSource | RunError | None = None
    if collectives.rank == 0:
        try:
            found = _find(loaded, config.source, download, where)
        except RunError as error:
            found = error
    found = collectives.broadcast_pickled(found)
    if isinstance(found, RunError):
        raise found
    assert found is not None
    _check_visible(collectives, found, where)
    changed = _changed_since(directory, config.source, found)
    return InitialWeights(config, found, where, download, [changed] if changed else [])


def _find(loaded: LoadedConfig, source: str, download: Path, where: str) -> WeightSource:
    if not is_artifact(source):
        return find_source(source, loaded.start, download, where)
    track = loaded.config.track
    name = parse_name(source, where, project=track.wandb_project, entity=track.wandb_entity)
    return artifact_weights(name, download, where)


def load_initial_weights(initial: InitialWeights, strategy: Strategy, ema: Ema | None) -> Loaded:
    """Fills the parameters and the persistent buffers of the model that the source has, from which
    the average of weights starts as well; collective.

    Raises UsageError where names or shapes are not those of the model (with ``strict``), or where
    none is, and RetryError where the files cannot be read any more.
    """
    source, where = initial.source, initial.where
    _adopt_buffers(strategy.bare_model, source)
    targets = strategy.tensors()
    model = {
        name: Entry(tuple(shard.shape), str(shard.dtype).removeprefix("torch."))
        for name, shard in targets.items()
    }
    match = compare(model, names_of_tensors(strategy.bare_model), source.entries)
    summary = f"{len(match.used)} of the {len(model)} tensors of the model are loaded"
    if not match.used or (initial.config.strict and not match.is_complete):
        remedy = (
            "Correct the source or the model, or set init_from.strict=false to load only what "
            "matches."
            if match.used
            else "Name the weights of this model."
        )
        _log_all(match, initial)
        fits = f"{len(match.used)} of the {len(model)} tensors of the model match"
        lines = "\n".join(match.lines(_SHOWN))
        raise UsageError(f"{where}, of which {fits}:\n{lines}\n{remedy}")
    _read(initial, strategy.collectives, {o: targets[n] for n, o in match.used.items()})
    untied = _differing_ties(initial, strategy.collectives, targets, match)
    if untied and initial.config.strict:
        raise UsageError(
            f"{where}, which has other values for {untied[0][2]} than for {untied[0][1]}, but "
            "these are one tensor in the model; untie them in the model, or set "
            f"init_from.strict=false to load {untied[0][1]}."
        )
    strategy.sync_weights()
    if ema:
        ema.restart()
    if strategy.collectives.rank == 0:
        remove_download(initial.download)
    notes = [*initial.notes]
    if not match.is_complete:
        _log_all(match, initial)
        notes.append("\n".join([f"{where}: {summary}.", *match.lines(_SHOWN)]))
    for name, used, dropped in untied:
        notes.append(f"{dropped} in {source.path} is not loaded: {name} is tied to {used}.")
    if source.has_extra_state:
        notes.append(
            f"{source.path} has extra state (get_extra_state) of modules, which is not loaded: "
            "init_from loads parameters and buffers only."
        )
    # What a download leaves behind is the URL, not the directory.
    downloaded = initial.download in source.path.parents
    place = initial.config.source if downloaded else str(source.path)
    if source.artifact:
        place = f"{PREFIX}{source.artifact}"
    at = "" if source.step is None else f", step {source.step}"
    record = {
        "source": initial.config.source,
        "path": place,
        "step": source.step,
        "run": source.run,
        "sha256": source.sha256,
        "tensors": len(match.used),
        "of": len(model),
    }
    return Loaded(f"Initial weights: {summary} from {place}{at}", notes, record)


def changes_without_effect(attempt: Attempt) -> list[str]:
    """A warning if a run that resumes names another source than before."""
    keys = {change.key.partition(".")[0] for change in attempt.changes if change.changes_results}
    if attempt.resume_step is None or "init_from" not in keys:
        return []
    return [
        "init_from has changed, which has no effect: the run resumes from its own checkpoint; to "
        "start from other weights, choose another run.name or run.dir."
    ]


def _check_visible(collectives: Collectives, source: WeightSource, where: str) -> None:
    everyone = collectives.all_gather_object((socket.gethostname(), source.is_visible()))
    for rank, (host, visible) in enumerate(everyone):
        if not visible:
            raise UsageError(
                f"{where}, but rank {rank} on {host} does not see {source.path}; put it on a file "
                "system that all hosts share."
            )


def _changed_since(directory: RunDirectory, named: str, source: WeightSource) -> str | None:
    """A warning if an earlier attempt has loaded other weights from the same place. No step of that
    attempt is committed, so that none of its weights are in the result."""
    before = [
        record
        for values in directory.attempts.by_number().values()
        if isinstance(record := values.get("init_from"), dict) and record.get("source") == named
    ]
    if not before or before[-1].get("sha256") == source.sha256:
        return None
    step = before[-1].get("step")
    at = f" of step {step}" if step is not None else ""
    now = f" of step {source.step}" if source.step is not None else ""
    return (
        f"init_from.source {named!r} has changed since an earlier attempt of this run loaded it: "
        f"that attempt, which left no checkpoint, started from weights{at} with the SHA-256 "
        f"{str(before[-1].get('sha256'))[:12]}, and this one starts from weights{now} with "
        f"{source.sha256[:12]}."
    )


def _adopt_buffers(model: torch.nn.Module, source: WeightSource) -> None:
    """Allocates the persistent buffers that the model does not have before its first forward pass:
    None, or without elements."""
    for path, module in model.named_modules():
        for name, tensor in module._buffers.items():
            entry = source.entries.get(f"{path}.{name}" if path else name)
            if entry is None or name in module._non_persistent_buffers_set:
                continue
            dtype = getattr(torch, entry.dtype, None)
            is_empty = tensor is None or (not tensor.numel() and tensor.shape != entry.shape)
            if is_empty and isinstance(dtype, torch.dtype):
                device = next((p.device for p in model.parameters()), torch.device("cpu"))
                module._buffers[name] = torch.zeros(entry.shape, dtype=dtype, device=device)


def _read(initial: InitialWeights, collectives: Collectives, targets: dict[str, Shard]) -> None:
    """Loads the shards, by the names in the source; collective. Raises on all ranks what one rank
    got."""
    failed: str | None = None
    try:
        with torch.no_grad():
            initial.source.load(targets, collectives.host_group)
    except DamagedError as error:
        failed = str(error)
    except OSError as error:
        failed = f"{error.filename or initial.source.path}: {error.strerror or first_line(error)}"
    failures = [failure for failure in collectives.all_gather_object(failed) if failure]
    if not failures:
        return
    raise RetryError(
        f"{initial.where}, which was valid a moment ago and cannot be read now ({failures[0]}); "
        "check that nothing changes or removes it, then rerun."
    )


def _differing_ties(
    initial: InitialWeights,
    collectives: Collectives,
    targets: dict[str, Shard],
    match: Match,
) -> list[tuple[str, str, str]]:
    """Those of ``match.tied`` whose two tensors of the source differ; collective."""
    found = []
    for name, used, second in match.tied:
        own = targets[name]
        other = own.with_local(torch.empty_like(own.local))
        _read(initial, collectives, {second: other})
        if any(collectives.all_reduce_ints([int(not torch.equal(own.local, other.local))])):
            found.append((name, used, second))
    return found


def _log_all(match: Match, initial: InitialWeights) -> None:
    """Writes all names to the log file."""
    if len(match.missing) + len(match.unexpected) + len(match.other) > _SHOWN:
        _log.info("%s:\n%s", initial.where, "\n".join(match.lines(_LOGGED)))
