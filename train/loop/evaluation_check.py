"""A small evaluation before the first step, which finds mistakes in a task's metrics and report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from torch import nn

from train.config.schema import Config
from train.data.loader import Batches
from train.distributed.randomness import GlobalRngState
from train.loop.early_stop import metric_value
from train.loop.evaluate import EvaluationStoppedError, add_up, evaluate, make_report
from train.loop.forward_effects import RefusedEffects
from train.strategies.base import Strategy
from train.tasks.base import Task

T = TypeVar("T")
_DRAWS = (
    "measure(), or the update() of a metric, draws random numbers in an evaluation. They are "
    "seeded by the run's seed and the first sample of each micro-batch, so the metrics depend on "
    "evaluate.micro_batch_size and on the number of ranks."
)


def check_evaluation(
    task: Task,
    strategy: Strategy,
    config: Config,
    first: Batches,
    every: Callable[[], Batches],
    *,
    stop: Callable[[], bool],
) -> list[str]:
    """Evaluates ``first``, one micro-batch on each rank, tries the report, and looks up the metrics
    that the config names; collective. Returns warnings.

    Without it, a mistake in ``measure``, ``metrics``, ``derive`` or ``report`` would end the run at
    its first evaluation, perhaps hours later. What these samples are too few for, such as the
    metric of a rare class, is tried with ``every`` micro-batch, unless ``stop()`` is true on a rank
    meanwhile. Raises what an evaluation raises, and UsageError for settings that are not restored.
    """

    engine, model, seed = strategy.engine, strategy.bare_model, config.run.seed
    refused = RefusedEffects(strategy, compiled=config.compile)
    generators: list[GlobalRngState] = []

    def call(function: Callable[[nn.Module], T]) -> T:
        generators[:] = [GlobalRngState(cuda=True)]
        with refused.watching():
            return strategy.call(function)

    strategy.sync_buffers()
    with first as batches:
        totals = add_up(engine, call, model, task, batches, seed=seed)
    draws = any(engine.collectives.all_reduce_ints([int(any(g.changed() for g in generators))]))
    metrics: dict[str, float] | None = None
    # derive() and compute(), which get the same on all ranks, may divide by a count of 0 here.
    with suppress(ArithmeticError, LookupError, ValueError, RuntimeError):
        metrics = totals.metrics()
    make_report(engine, call, model, task, seed, check=True)
    refused.check("first evaluation")
    wanted = {}
    if config.checkpoint.keep_best:
        wanted["checkpoint.keep_best.metric"] = config.checkpoint.keep_best.metric
    if config.early_stop:
        wanted["early_stop.metric"] = config.early_stop.metric
    if metrics is None or not metrics.keys() >= set(wanted.values()):
        try:
            with every() as batches:
                metrics = evaluate(
                    engine, strategy.call, model, task, batches, seed=seed, stop=stop
                )
        except EvaluationStoppedError:
            return []
    for field, name in wanted.items():
        metric_value(metrics, name, field)
    return [_DRAWS] if draws else []
