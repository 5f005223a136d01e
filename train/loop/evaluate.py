"""Evaluation: each sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from train.data.fetch import MicroBatch
from train.data.order import evaluation_seed, report_seed
from train.distributed.randomness import seed_everything
from train.exits import UsageError
from train.loop.metric_objects import MetricObjects
from train.strategies.engine import Engine
from train.strategies.model_call import CallModel
from train.tasks.base import Ratio, Task
from train.tasks.checked import measures_of, numbers_of, report_of
from train.tasks.modes import evaluating


class EvaluationStoppedError(Exception):
    """The evaluation was not completed, because a rank was asked to stop."""


def evaluate(
    engine: Engine,
    call: CallModel,
    model: nn.Module,
    task: Task,
    batches: Iterable[MicroBatch],
    *,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The task's metrics over all batches of all ranks, the same on every rank; collective.

    ``call`` gives the model to the task's ``measure``; it is in evaluation mode meanwhile. A
    micro-batch whose ``counts`` is false is computed so that all ranks make equally many forward
    passes, but adds nothing. Sums are in float64. Random numbers are seeded for each micro-batch,
    from the run's ``seed``. Raises EvaluationStoppedError when ``stop()`` is true on any rank, and
    UsageError for metrics that cannot be added up.
    """
    return add_up(engine, call, model, task, batches, seed=seed, stop=stop).metrics()


class Totals:
    """What an evaluation has added up, on this rank."""

    def __init__(
        self, engine: Engine, task: Task, sums: dict[str, torch.Tensor], objects: MetricObjects
    ) -> None:
        self._engine, self._task, self._sums, self._objects = engine, task, sums, objects

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks, the same on every rank; collective."""
        summed = _add_over_ranks(self._sums, self._engine)
        collectives = self._engine.collectives
        metrics = _joined(
            {name: _ratio(*total) for name, total in summed.items()},
            self._objects.compute(collectives),
            numbers_of(self._task.derive(summed), "derive()"),
        )
        # What ranks decide by a metric, such as an early stop, they must decide alike.
        return collectives.broadcast_object(metrics)


def add_up(
    engine: Engine,
    call: CallModel,
    model: nn.Module,
    task: Task,
    batches: Iterable[MicroBatch],
    *,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> Totals:
    """The first part of :func:`evaluate`: all that needs the model."""
    collectives = engine.collectives
    totals: dict[str, torch.Tensor] = {}
    objects = MetricObjects(task, engine.device)
    with evaluating(model), torch.no_grad():
        for micro in batches:
            if any(collectives.all_reduce_ints([int(stop())])):
                raise EvaluationStoppedError
            batch = engine.to_device(micro.batch)
            seed_everything(evaluation_seed(seed, int(micro.positions[0])), engine.device)
            measures = call(partial(measures_of, task, batch=batch, objects=objects))
            for name, value in measures.items() if micro.counts else ():
                if name in objects:
                    objects.update(name, value)
                    continue
                pair = torch.stack([_double(part, engine.device) for part in value])
                totals[name] = totals[name] + pair if name in totals else pair
    return Totals(engine, task, totals, objects)


def make_report(
    engine: Engine, call: CallModel, model: nn.Module, task: Task, seed: int, *, check: bool = False
) -> dict[str, Any]:
    """The task's texts and images, with random numbers of the run's ``seed``; collective.
    ``check``: only what the task makes for a check."""
    seed_everything(report_seed(seed), engine.device)
    with evaluating(model):
        return call(partial(report_of, task, device=engine.device, check=check))


def _double(part: Any, device: torch.device) -> torch.Tensor:
    """A number or a tensor with one element as a scalar in float64 on the device."""
    if isinstance(part, torch.Tensor):
        return part.detach().to(device).double().reshape(())
    return torch.tensor(float(part), dtype=torch.float64, device=device)


def _add_over_ranks(totals: dict[str, torch.Tensor], engine: Engine) -> dict[str, Ratio]:
    """Sums and counts over all ranks; collective. A rank may lack a name, such as that of a class
    that its samples do not have: it has nothing to add to it."""
    by_rank = engine.collectives.all_gather_object(list(totals))
    names = list(dict.fromkeys(name for own in by_rank for name in own))
    if not names:
        return {}
    nothing = torch.zeros(2, dtype=torch.float64, device=engine.device)
    joined = torch.stack([totals.get(name, nothing) for name in names])
    sums = engine.collectives.all_reduce(joined).tolist()
    return {name: Ratio(*pair) for name, pair in zip(names, sums, strict=True)}


def _joined(*sources: dict[str, float]) -> dict[str, float]:
    """All metrics. Raises UsageError where two have one name."""
    metrics: dict[str, float] = {}
    for found in sources:
        if twice := metrics.keys() & found.keys():
            raise UsageError(
                f"The task has two metrics named {min(twice)!r}, from measure(), metrics() or "
                "derive(); rename one of them."
            )
        metrics |= found
    return metrics


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
