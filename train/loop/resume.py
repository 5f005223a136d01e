"""Brings an opened run to where its newest checkpoint was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from train.checkpoint.state import restore_state
from train.checkpoint.store import DamagedError, Manifest
from train.data.plan import BatchPlan
from train.exits import ResumeRefusedError, RetryError
from train.loop.state import Progress
from train.optim.optimizer import restore_param_group_values

if TYPE_CHECKING:
    from train.loop.run import Run


def resume(run: Run, step: int) -> None:
    """Fills model, optimiser and counters from the checkpoint of a step; collective.

    Raises ResumeRefusedError where data or model are not those it was written with.
    """
    path = run.store.path(step)
    manifest = Manifest.read(path)
    state = manifest.state
    if state["samples"] != run.order.size and not run.allow_changes:
        raise ResumeRefusedError(
            f"The training data has {run.order.size} samples now, but had {state['samples']} "
            f"when step {step} was saved, so each position of the stream would "
            "mean another sample; restore the data, choose another run.dir for a new run, or "
            "add --allow-changes."
        )
    try:
        restore_state(
            path,
            state["optimizer"],
            run.engine.strategy,
            run.ema,
            run.engine.host_group,
        )
    except DamagedError as error:
        raise RetryError(f"{error}, although it was whole a moment ago; start again.") from None
    run.progress = Progress(**state["progress"])
    run.window.load_state_dict(state["window"])
    restore_param_group_values(
        run.engine.optimizer, run.config.optim, state.get("optimizer_groups", [])
    )
    if run.early_stop and state["early_stop"]:
        run.early_stop.load_state_dict(state["early_stop"])
    if run.engine.loss_scale and state.get("loss_scale"):
        run.engine.loss_scale.load_state_dict(state["loss_scale"])
    run.saving.last_step = step


def moved_dropout(last: Mapping[str, Any], plan: BatchPlan, model: nn.Module) -> list[str]:
    """What there is to tell of a model with dropout whose steps were cut otherwise by the ``last``
    attempt: a micro-batch draws from one seed, so its masks are others now."""
    before, now = last.get("micro_batch_size"), plan.largest_micro_batch
    if before in (None, now) or not any(
        isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()
    ):
        return []
    return [
        f"Micro-batches have {now} samples now and had {before} before, so dropout draws other "
        "masks: the run goes on well, but not to the same numbers. For the same on every "
        "placement, begin a run with a batch.micro_batch_size that suits all of them."
    ]
