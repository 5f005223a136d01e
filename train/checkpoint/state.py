"""The tensors of a checkpoint: model, optimiser state and averaged weights (EMA).

Names do not depend on the placement: ``model.<fully qualified name>``,
``optim.<parameter name>.<state>``, ``ema.<parameter name>`` and
``extra.<module>._extra_state.<number>``. What is not a tensor in the state of the optimiser and of
modules goes into the manifest's JSON. RNG states are not stored: they are seeded by position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from train.checkpoint import dcp
from train.checkpoint.buffers import adopt_buffers
from train.checkpoint.extra_state import ExtraState, get_extra_state, set_extra_state
from train.checkpoint.manifest import Manifest
from train.distributed.shard import Shard, is_extra_state, model_tensors
from train.exits import ResumeRefusedError
from train.optim.ema import Ema
from train.suggest import listed

_log = logging.getLogger("train")

OptimizerState = dict[str, dict[str, Any]]
"""A Shard or a JSON value, by parameter name and state name."""


StoredState = Mapping[str, Mapping[str, Any]]
"""Optimiser state in a checkpoint: by parameter name and state name, a (shape, dtype) pair or a
JSON value."""


class ShardedState(Protocol):
    """A model and its optimiser whose tensors are sharded over the ranks."""

    def tensors(self) -> dict[str, Shard]:
        """Parameters and persistent buffers by fully qualified name."""

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state; empty before its first step."""

    def make_optimizer_state(self, stored: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """Allocates optimiser state like the stored one, to be filled by the caller.

        ``stored`` holds, by parameter name and state name, a (shape, dtype) pair or a JSON value.
        """

    def adopt_optimizer_state(self, state: OptimizerState) -> None:
        """Makes the filled state the optimiser's own."""

    def sync_weights(self) -> None:
        """Copies the tensors to the parameters that the forward pass uses; collective."""


def collect_state(
    strategy: ShardedState, ema: Ema | None
) -> tuple[dict[str, Shard], dict[str, Any]]:
    """This rank's shards of all tensors by name, sharing their memory, and the optimiser state that
    is not a tensor, as JSON values."""
    shards = {f"model.{name}": shard for name, shard in strategy.tensors().items()}
    state = strategy.optimizer_state()
    values = {
        f"{name}.{key}": value
        for name, entries in state.items()
        for key, value in entries.items()
        if not isinstance(value, Shard)
    }
    shards |= _optimizer_shards(state)
    if ema is not None:
        shards |= {f"ema.{name}": average for name, average in ema.averages.items()}
    return shards, values


def _optimizer_shards(state: OptimizerState) -> dict[str, Shard]:
    return {
        f"optim.{name}.{key}": value
        for name, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Shard)
    }


def restore_state(
    directory: Path,
    values: Mapping[str, Any],
    strategy: ShardedState,
    ema: Ema | None,
    group: Any = None,
    choose: Callable[[StoredState], StoredState | None] = lambda stored: stored,
) -> bool:
    """Loads model, optimiser state and averaged weights from a checkpoint; collective over
    ``group``.

    ``values`` is the optimiser state that is not a tensor, from the manifest. ``choose`` returns
    the part of the stored optimiser state to load; None leaves the optimiser as it is. Returns
    whether optimiser state was loaded. Raises ResumeRefusedError if names or shapes are not those
    of the model, and DamagedError.
    """
    stored = dcp.shapes(directory)
    targets = {f"model.{name}": shard for name, shard in strategy.tensors().items()}
    if ema is not None:
        targets |= {f"ema.{name}": average for name, average in ema.averages.items()}
    unused = [
        name
        for name in stored
        if name.startswith(("model.", "ema.")) and name not in targets and not is_extra_state(name)
    ]
    remedy = "use the code and config that wrote it, or start a new run in another run.dir"
    _check_same(directory, targets, stored, unused, remedy)
    pieces: dict[str, Any] = {
        name.removeprefix("optim."): entry
        for name, entry in stored.items()
        if name.startswith("optim.")
    }
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, piece in {**pieces, **values}.items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = piece
    chosen = choose(by_parameter)
    state = None if chosen is None else strategy.make_optimizer_state(chosen)
    targets |= _optimizer_shards(state or {})
    with torch.no_grad():
        dcp.load(targets, directory, group)
    if state is not None:
        strategy.adopt_optimizer_state(state)
    strategy.sync_weights()
    return chosen is not None


def collect_extra_state(model: nn.Module, rank: int) -> tuple[dict[str, Shard], dict[str, Any]]:
    """What the modules' ``get_extra_state`` returns: tensors by name, only on rank 0, which may not
    be equal to those of other ranks; and JSON values."""
    state = get_extra_state(model)
    tensors = state.tensors if rank == 0 else {}
    return {f"extra.{name}": Shard.of(tensor) for name, tensor in tensors.items()}, state.values


def restore_extra_state(
    directory: Path, values: Mapping[str, Any] | None, model: nn.Module, group: Any = None
) -> None:
    """Passes to the modules what they had returned; collective over ``group``.

    ``values`` are the JSON values of the manifest; None in a checkpoint of an earlier version,
    which has none. Raises ResumeRefusedError where other modules have extra state.
    """
    own = get_extra_state(model).values.keys()
    if values is None:
        if own:
            _log.warning(
                "The checkpoint %s was written by a version that does not store what "
                "get_extra_state() returns, so the extra state of %s starts anew.",
                *(directory, ", ".join(sorted(own))),
            )
        return
    if differences := sorted(own ^ values.keys()):
        where = "the model" if differences[0] in own else "the checkpoint"
        raise ResumeRefusedError(
            f"The checkpoint {directory} does not match the model: {differences[0]} is only in "
            f"{where}; use the code and config that wrote it."
        )
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in dcp.shapes(directory).items()
        if name.startswith("extra.")
    }
    if tensors:
        dcp.load({name: Shard.of(tensor) for name, tensor in tensors.items()}, directory, group)
    loaded = {name.removeprefix("extra."): tensor for name, tensor in tensors.items()}
    set_extra_state(model, ExtraState(dict(values), loaded))


def model_shapes(directory: Path) -> dict[str, torch.Size]:
    """The shapes of the model's tensors in a checkpoint, by name. Raises DamagedError."""
    return {
        name.removeprefix("model."): shape
        for name, (shape, _) in dcp.shapes(directory).items()
        if name.startswith("model.")
    }


def restore_model(directory: Path, model: nn.Module, *, averaged: bool) -> None:
    """Loads a full model in this process; ``averaged``: trainable parameters from the EMA.

    Raises ResumeRefusedError if names or shapes are not those of the model, and DamagedError.
    """
    adopt_buffers(model, dcp.shapes(directory), prefix="model.")
    # A run makes buffers of parameters without elements: they have no average.
    averages = {
        n for n, p in model.named_parameters() if averaged and p.requires_grad and p.numel()
    }
    targets = {
        ("ema." if name in averages else "model.") + name: Shard.of(tensor)
        for name, tensor in model_tensors(model).items()
    }
    stored = dcp.shapes(directory)
    names = {n for n in stored if n.startswith("model.") and not is_extra_state(n)}
    unused = names - {f"model.{name}" for name in model_tensors(model)}
    _check_same(directory, targets, stored, unused, "use the code and config that wrote it")
    with torch.no_grad():
        dcp.load(targets, directory, None)
    restore_extra_state(directory, Manifest.read(directory).state.get("extra_state"), model)


def _check_same(
    directory: Path,
    targets: Mapping[str, Shard],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    unused: Iterable[str],
    remedy: str,
) -> None:
    """Raises ResumeRefusedError where names or shapes differ. ``unused`` are the tensors of the
    checkpoint that the model lacks."""
    differences = [f"{name} is not in the checkpoint" for name in targets if name not in stored]
    differences += [f"{name} is only in the checkpoint" for name in sorted(unused)]
    differences += [
        f"{name} has shape {tuple(stored[name][0])} in the checkpoint and "
        f"{tuple(shard.shape)} in the model"
        for name, shard in targets.items()
        if name in stored and stored[name][0] != shard.shape
    ]
    if differences:
        raise ResumeRefusedError(
            f"The checkpoint {directory} does not match the model: "
            f"{listed(differences, 3, separator='; ')}; {remedy}."
        )
