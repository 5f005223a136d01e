"""Opens the tracker of an attempt, and says what its user must know."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.config.load import LoadedConfig
from train.data.plan import BatchPlan
from train.distributed.world import world_warnings
from train.loop.failure import on_error
from train.loop.state import Progress
from train.runs.state import described_end
from train.setup.build import RunData, TrainableModel
from train.setup.facts import of_record
from train.setup.join import Joined
from train.setup.micro_batch_effects import micro_batch_warnings
from train.tasks.base import Task
from train.tasks.registry import unused_methods
from train.track.event_log import start_text
from train.track.sinks import RunInfo
from train.track.tracker import Tracker
from train.track.wandb_nodes import NodeMetrics, stands_for_its_node

ATTEMPTS = 50
"""The most attempts whose facts the sinks get."""
_log = logging.getLogger("train")


def open_tracker(
    stack: ExitStack,
    loaded: LoadedConfig,
    directory: RunDirectory,
    store: CheckpointStore,
    joined: Joined,
    task: Task,
    data: RunData,
    plan: BatchPlan,
    model: TrainableModel,
    progress: Progress,
    facts: dict[str, Any],
    notes: Sequence[str],
    inputs: Sequence[str],
) -> Tracker:
    """The tracker of this attempt, which closes with ``stack``. Warns of what a user must know
    before the first step: ``notes``, and what the data, the world and the task show. ``inputs``:
    the artifacts of W&B that the attempt has started from."""
    engine, attempt = joined.engine, joined.attempt
    info = RunInfo(
        id=attempt.identity.id,
        name=attempt.identity.name,
        directory=directory.path,
        attempt=attempt.number,
        wandb_id=attempt.identity.wandb_id,
        config=loaded.config.model_dump(mode="json"),
        code=joined.code,
        unit=task.unit,
        total_steps=data.total_steps,
        start_step=progress.step,
        inputs=tuple(inputs),
        facts={**facts, "attempts": _attempts(directory, attempt.number, joined.code, facts)},
        **({"changes": joined.changes.wait} if joined.changes else {}),
    )
    track = loaded.config.track
    wants_node = track.wandb_nodes and track.wandb not in ("disabled", "offline")
    node = None
    if wants_node and stands_for_its_node(engine.world, joined.hosts):
        node = NodeMetrics(info, track, engine.rank)
    tracker = Tracker(track, info, is_main=engine.is_main, store=store, node=node)
    stack.callback(tracker.close)
    stack.push(on_error(lambda code, text: tracker.fail(code)))
    gpus = torch.cuda.device_count() if engine.device.type == "cuda" else 0
    last = directory.attempts.last()
    if last and attempt.number > 1:
        end = described_end(directory.path, attempt.number - 1, last)
        _log.info("the attempt before: %s", end)
        tracker.event(
            f"{start_text(attempt.number, progress.step)}; the attempt before: {end.rstrip('.')}."
        )
    depends = micro_batch_warnings(last, plan, model.strategy.bare_model)
    unused = unused_methods(type(task))
    world = world_warnings(engine.world, gpus)
    git = joined.code.get("git")
    unknown = [f"The git commit is not recorded: {git}."] if git else []
    for note in [*attempt.notes, *notes, *unknown, *world, *data.warnings, *depends, *unused]:
        tracker.warn(note)
    return tracker


def _attempts(
    directory: RunDirectory, number: int, code: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """The facts of the newest attempts by number: W&B keeps only the last value of a key."""
    before = {
        str(n): of_record(values)
        for n, values in sorted(directory.attempts.by_number().items())[1 - ATTEMPTS :]
        if n < number
    }
    return {**before, str(number): {**facts, "code": code, "time": time.time()}}
