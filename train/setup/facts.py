"""What an attempt runs on, once per attempt: for attempts.jsonl and for the sinks."""

from __future__ import annotations

from typing import Any

from train.config.load import LoadedConfig
from train.data.plan import BatchPlan
from train.setup.build import RunData, TrainableModel
from train.setup.environment import environment, image
from train.setup.join import Joined
from train.track.sinks import dataset_facts

RECORDED = ("environment", "image", "dataset", "model_summary")
"""The facts that a line of attempts.jsonl has under these names; it has the placement as well."""


def attempt_facts(
    loaded: LoadedConfig, joined: Joined, data: RunData, plan: BatchPlan, model: TrainableModel
) -> dict[str, Any]:
    """``placement``, ``environment``, ``image``, ``dataset`` and ``model_summary`` of this attempt,
    as JSON values. ``image`` is None outside a container that tells it."""
    engine = joined.engine
    return {
        "placement": {
            "strategy": model.strategy.setup.name,
            "world_size": engine.world_size,
            "hosts": list(dict.fromkeys(joined.hosts)),
            "device": engine.device.type,
            "precision": loaded.config.precision,
            "micro_batch_size": plan.micro_batch_size,
        },
        "environment": environment(engine.device),
        "image": image(),
        "dataset": dataset_facts(data.order.size, data.fingerprint.to_json()),
        "model_summary": model.summary,
    }


def of_record(attempt: dict[str, Any]) -> dict[str, Any]:
    """The same of an earlier attempt, from its line of attempts.jsonl, with its code and its
    end."""
    placement = ("strategy", "world_size", "hosts", "device", "micro_batch_size")
    others = (*RECORDED, "code", "time", "resumed_from_step", "init_from", "ended")
    return {
        "placement": {name: attempt[name] for name in placement if name in attempt},
        **{name: attempt[name] for name in others if name in attempt},
    }
