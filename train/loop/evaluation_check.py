"""A small evaluation before the first step, which finds mistakes in a task's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from train.config.schema import Config
from train.data.loader import Batches
from train.loop.early_stop import metric_value
from train.loop.evaluate import evaluate
from train.strategies.base import Strategy
from train.strategies.call_order import same_calls
from train.tasks.base import Task

T = TypeVar("T")


def check_evaluation(task: Task, strategy: Strategy, config: Config, batches: Batches) -> None:
    """Evaluates ``batches``, one micro-batch on each rank, and looks up the metrics that the config
    names; collective.

    Without it, a mistake in ``measure``, ``metrics`` or ``derive`` would end the run at its first
    evaluation, perhaps hours later. Raises what an evaluation raises.
    """

    def call(function: Callable[[nn.Module], T]) -> T:
        with same_calls(strategy.gathering_modules(), strategy.collectives):
            return strategy.call(function)

    strategy.sync_buffers()
    with batches as each:
        metrics = evaluate(strategy.engine, call, strategy.bare_model, task, each)
    if config.checkpoint.keep_best:
        metric_value(metrics, config.checkpoint.keep_best.metric, "checkpoint.keep_best.metric")
    if config.early_stop:
        metric_value(metrics, config.early_stop.metric, "early_stop.metric")
