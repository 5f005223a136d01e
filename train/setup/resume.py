"""Restores an opened run from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from train.checkpoint import dcp
from train.checkpoint.buffers import adopt_buffers
from train.checkpoint.state import restore_extra_state, restore_state
from train.checkpoint.store import CheckpointStore, DamagedError, Manifest
from train.data.plan import BatchPlan
from train.exits import ResumeRefusedError, RetryError
from train.optim.ema import Ema
from train.optim.optimizer import OptimConfig, restore_param_group_values
from train.strategies.base import Strategy


def resume(
    store: CheckpointStore,
    step: int,
    strategy: Strategy,
    ema: Ema | None,
    optim: OptimConfig,
    *,
    samples: int,
    allow_changes: bool,
) -> dict[str, Any]:
    """Fills the model, the optimiser, the loss scale and the average of weights from the
    checkpoint of a step; collective.

    Returns the rest of the checkpoint's state, as JSON values. ``samples`` is the size of the
    training data. Raises ResumeRefusedError where the data or the model are not those of the
    checkpoint.
    """
    path = store.path(step)
    state = Manifest.read(path).state
    if state["samples"] != samples and not allow_changes:
        raise ResumeRefusedError(
            f"The training data has {samples} samples, but had {state['samples']} when step {step} "
            "was saved, so that each position of the stream would be another sample; restore the "
            "data, use another run.dir for a new run, or add --allow-changes."
        )
    try:
        group = strategy.collectives.host_group
        adopt_buffers(strategy.bare_model, dcp.shapes(path), prefix="model.")
        restore_state(path, state["optimizer"], strategy, ema, group)
        restore_extra_state(path, state.get("extra_state"), strategy.bare_model, group)
    except DamagedError as error:
        raise RetryError(
            f"{error}, although it was valid a moment ago; check the storage, then rerun."
        ) from None
    restore_param_group_values(strategy.optimizer, optim, state.get("optimizer_groups", []))
    if strategy.loss_scale and state.get("loss_scale"):
        strategy.loss_scale.load_state_dict(state["loss_scale"])
    return state


def moved_dropout(last: Mapping[str, Any], plan: BatchPlan, model: nn.Module) -> list[str]:
    """A warning where a model with dropout has other micro-batches than in the ``last`` attempt:
    a micro-batch draws from one seed, so its masks differ."""
    before, now = last.get("micro_batch_size"), plan.largest_micro_batch
    if before in (None, now) or not any(
        isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()
    ):
        return []
    return [
        f"Micro-batches have {now} samples now and had {before} before, so dropout draws other "
        "masks and the numbers differ from those of an unmoved run. For the same numbers on every "
        "placement, start the run with a batch.micro_batch_size that all placements can use."
    ]
