"""A small evaluation before the first step, which finds mistakes in a task's metrics and report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from train.config.schema import Config
from train.data.loader import Batches
from train.loop.early_stop import metric_value
from train.loop.evaluate import EvaluationStoppedError, evaluate, make_report
from train.loop.forward_effects import RefusedEffects
from train.strategies.base import Strategy
from train.tasks.base import Task

T = TypeVar("T")


def check_evaluation(
    task: Task,
    strategy: Strategy,
    config: Config,
    first: Batches,
    every: Callable[[], Batches],
    *,
    stop: Callable[[], bool],
) -> None:
    """Evaluates ``first``, one micro-batch on each rank, makes the report, and looks up the metrics
    that the config names; collective.

    Without it, a mistake in ``measure``, ``metrics``, ``derive`` or ``report`` would end the run at
    its first evaluation, perhaps hours later. A metric that these samples do not have, such as that
    of a rare class, is looked up in an evaluation of ``every`` micro-batch, unless ``stop()`` is
    true on a rank meanwhile. Raises what an evaluation raises.
    """

    engine, model = strategy.engine, strategy.bare_model
    refused = RefusedEffects(strategy, compiled=config.compile)

    def call(function: Callable[[nn.Module], T]) -> T:
        with refused.watching():
            return strategy.call(function)

    strategy.sync_buffers()
    with first as batches:
        metrics = evaluate(engine, call, model, task, batches)
    make_report(engine, call, model, task, config.run.seed)
    refused.check("first evaluation")
    wanted = {}
    if config.checkpoint.keep_best:
        wanted["checkpoint.keep_best.metric"] = config.checkpoint.keep_best.metric
    if config.early_stop:
        wanted["early_stop.metric"] = config.early_stop.metric
    if not metrics.keys() >= set(wanted.values()):
        try:
            with every() as batches:
                metrics = evaluate(engine, strategy.call, model, task, batches, stop=stop)
        except EvaluationStoppedError:
            return
    for field, name in wanted.items():
        metric_value(metrics, name, field)
