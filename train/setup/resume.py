"""What a checkpoint has of the model and the optimiser, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.checkpoint import dcp
from train.checkpoint.buffers import adopt_buffers
from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.state import (
    StoredState,
    collect_extra_state,
    collect_state,
    restore_extra_state,
    restore_state,
)
from train.checkpoint.store import CheckpointStore
from train.config.changes import Difference
from train.data.order import SampleOrder
from train.distributed.collectives import Collectives
from train.distributed.shard import Shard
from train.exits import ResumeRefusedError, RetryError
from train.optim.ema import Ema
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import (
    param_group_values,
    restore_param_group_values,
    state_settings,
)
from train.optim.state_form import state_that_fits
from train.setup.fingerprint import DataFingerprint
from train.strategies.base import Strategy


@dataclass(frozen=True)
class Resumed:
    """What a resumed run takes from its checkpoint, besides the tensors."""

    state: dict[str, Any]
    """The state of the loop, as JSON values."""
    notes: list[str]
    """Warnings for the user."""


def saved_state(strategy: Strategy, ema: Ema | None) -> tuple[dict[str, Shard], dict[str, Any]]:
    """This rank's tensors of a checkpoint by name, sharing memory with the model, and what else of
    the model and the optimiser :func:`resume` needs, as JSON values. Not collective."""
    shards, optimizer_values = collect_state(strategy, ema)
    tensors, extra_state = collect_extra_state(strategy.bare_model, strategy.collectives.rank)
    values = {
        "loss_scale": strategy.loss_scale.state_dict() if strategy.loss_scale else None,
        "optimizer": optimizer_values,
        "extra_state": extra_state,
        "optimizer_groups": param_group_values(strategy.optimizer),
    }
    return {**shards, **tensors}, values


def saved_facts(
    order: SampleOrder, batch: int, optim: OptimConfig, data: DataFingerprint
) -> dict[str, Any]:
    """What else :func:`resume` compares, as JSON values; ``batch``: the global batch size."""
    return {
        "samples": order.size,
        "seed": order.seed,
        "batch": batch,
        "optim": state_settings(optim),
        "data": data.to_json(),
    }


def resume(
    store: CheckpointStore,
    step: int,
    strategy: Strategy,
    ema: Ema | None,
    optim: OptimConfig,
    *,
    fingerprint: DataFingerprint,
    changes: Sequence[Difference],
    allow_changes: bool,
) -> Resumed:
    """Fills the model, the optimiser, the loss scale and the average of weights from the
    checkpoint of a step; collective.

    ``fingerprint`` is that of the training data, and ``changes`` are those of the config since the
    attempt before. An optimiser that keeps other state than the one that was saved starts without
    state. Raises ResumeRefusedError where the data or the model are not those of the checkpoint.
    """
    path = store.path(step)
    state = Manifest.read(path).state
    if not allow_changes:
        _check_data(strategy.collectives, state, step, fingerprint)
    saved = state.get("optim") or _settings_before(optim, changes)
    is_other = saved != state_settings(optim)

    def choose(stored: StoredState) -> StoredState | None:
        if not is_other or not any(stored.values()):
            return stored
        shapes = {name: shard.shape for name, shard in strategy.tensors().items()}
        return state_that_fits(optim, stored, shapes)

    try:
        group = strategy.collectives.host_group
        adopt_buffers(strategy.bare_model, dcp.shapes(path), prefix="model.")
        loaded = restore_state(path, state["optimizer"], strategy, ema, group, choose)
        restore_extra_state(path, state.get("extra_state"), strategy.bare_model, group)
    except DamagedError as error:
        raise RetryError(
            f"{error}, although it was valid a moment ago; check the storage, then rerun."
        ) from None
    if saved["use"] == optim.use:
        groups = state.get("optimizer_groups", [])
        restore_param_group_values(strategy.optimizer, optim, groups, saved["options"])
    if strategy.loss_scale and state.get("loss_scale"):
        strategy.loss_scale.load_state_dict(state["loss_scale"])
    return Resumed(state, [] if loaded else [_dropped_state(saved, optim, step)])


def _check_data(
    collectives: Collectives, state: Mapping[str, Any], step: int, fingerprint: DataFingerprint
) -> None:
    """Raises ResumeRefusedError on all ranks where the training data is not that of a checkpoint;
    collective."""
    difference = None
    if fingerprint.length != state["samples"]:
        difference = f"has {fingerprint.length} samples, but had {state['samples']}"
    elif collectives.rank == 0 and (name := fingerprint.difference(state.get("data"))):
        # Samples that are not the same twice are the task's own matter.
        difference = f"has another {name} than" if fingerprint.is_stable() else None
    if difference := collectives.broadcast_object(difference):
        raise ResumeRefusedError(
            f"The training data {difference} when step {step} was saved, so that positions of the "
            "stream would be other samples; restore the data, use another run.dir for a new run, "
            "or add --allow-changes."
        )


def _settings_before(optim: OptimConfig, changes: Sequence[Difference]) -> dict[str, Any]:
    """The settings of the optimiser in the attempt before, for a checkpoint that lacks them."""
    before = state_settings(optim)
    for change in changes:
        section, _, key = change.key.partition(".")
        name, _, option = key.partition(".")
        if section != "optim" or name not in before:
            continue
        if not option:
            before[name] = change.before
        elif change.before is None:
            before[name] = {k: v for k, v in before[name].items() if k != option}
        else:
            before[name] = {**before[name], option: change.before}
    return before


def _dropped_state(saved: Mapping[str, Any], optim: OptimConfig, step: int) -> str:
    now = state_settings(optim)
    key = next(key for key, value in now.items() if value != saved.get(key))
    return (
        f"optim.{key} is {now[key]!r}, but was {saved.get(key)!r} when step {step} was saved, so "
        "the optimiser starts without the saved state (such as moments), which it does not keep."
    )
