"""A small evaluation before the first step, which finds mistakes in a task's metrics."""

from __future__ import annotations

from train.config.schema import Config
from train.data.loader import Batches
from train.loop.early_stop import metric_value
from train.loop.evaluate import evaluate
from train.strategies.base import Strategy
from train.tasks.base import Task


def check_evaluation(task: Task, strategy: Strategy, config: Config, batches: Batches) -> None:
    """Evaluates ``batches``, one micro-batch on each rank, and looks up the metrics that the config
    names; collective.

    Without it, a mistake in ``measure``, ``metrics`` or ``derive`` would end the run at its first
    evaluation, perhaps hours later. Raises what an evaluation raises.
    """
    strategy.sync_buffers()
    with batches as each:
        metrics = evaluate(strategy.engine, strategy.model, task, each)
    if config.checkpoint.keep_best:
        metric_value(metrics, config.checkpoint.keep_best.metric, "checkpoint.keep_best.metric")
    if config.early_stop:
        metric_value(metrics, config.early_stop.metric, "early_stop.metric")
