"""Evaluation: each sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from train.data.fetch import MicroBatch
from train.exits import UsageError
from train.strategies.engine import Engine
from train.strategies.model_call import CallModel
from train.tasks.base import Task
from train.tasks.checked import measures_of, metrics_of, numbers_of
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
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The task's metrics over all batches of all ranks; collective.

    ``call`` gives the model to the task's ``measure``; it is in evaluation mode meanwhile. A
    micro-batch whose ``counts`` is false is computed so that all ranks make equally many forward
    passes, but adds nothing. Sums are in float64. Raises EvaluationStoppedError when ``stop()`` is
    true on any rank, and UsageError for metrics that cannot be added up.
    """
    collectives = engine.collectives
    names: list[str] = []
    totals: dict[str, torch.Tensor] = {}
    objects = {name: metric.to(engine.device) for name, metric in metrics_of(task).items()}
    for metric in objects.values():
        metric.reset()  # a task may return the same objects each time
    updated = False
    with evaluating(model), torch.no_grad():
        for micro in batches:
            if any(collectives.all_reduce_ints([int(stop())])):
                raise EvaluationStoppedError
            batch = engine.to_device(micro.batch)
            measures = call(partial(measures_of, task, batch=batch, objects=objects))
            for name, value in measures.items():
                if name in objects:
                    if micro.counts:
                        objects[name].update(*value)
                        updated = True
                    continue
                if name not in totals:
                    names.append(name)
                    totals[name] = torch.zeros(2, dtype=torch.float64, device=engine.device)
                if micro.counts:
                    totals[name] += torch.stack(
                        [torch.as_tensor(p, device=engine.device).double().squeeze() for p in value]
                    )
    # A rank's samples may lack a metric, such as that of a class.
    by_rank = collectives.all_gather_object(names)
    names = list(dict.fromkeys(name for own in by_rank for name in own))
    if objects and collectives.all_reduce_ints([int(updated)])[0] < engine.world_size:
        raise UsageError(
            f"The evaluation data has fewer samples than there are ranks ({engine.world_size}), "
            f"which the torchmetrics objects of the task's metrics() ({', '.join(objects)}) do not "
            "support; use fewer ranks, or more samples."
        )
    nothing = torch.zeros(2, dtype=torch.float64, device=engine.device)
    summed = {
        name: tuple(collectives.all_reduce(totals.get(name, nothing.clone())).tolist())
        for name in names
    }
    metrics = {name: _ratio(*summed[name]) for name in names}
    metrics |= numbers_of(
        {name: metric.compute() for name, metric in objects.items()}, "compute() of metrics()"
    )
    return metrics | numbers_of(task.derive(summed), "derive()")


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
