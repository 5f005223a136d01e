"""Evaluation: each sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from train.data.fetch import MicroBatch
from train.exits import UsageError
from train.strategies.engine import Engine
from train.tasks.base import Ratio, Task


class EvaluationStoppedError(Exception):
    """The evaluation was given up because somebody asked for a stop."""


def evaluate(
    engine: Engine,
    task: Task,
    batches: Iterable[MicroBatch],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The task's metrics over all batches of all ranks; collective.

    A micro-batch whose ``counts`` is false only keeps the ranks in step.
    Sums are added in float64. Raises EvaluationStoppedError when any rank's ``stop()`` is true.
    """
    names: list[str] = []
    totals: dict[str, torch.Tensor] = {}
    objects = {name: metric.to(engine.device) for name, metric in task.metrics().items()}
    for metric in objects.values():
        metric.reset()  # a task may give the same objects each time
    updated = False
    was_training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        for micro in batches:
            if any(engine.sum_ints([int(stop())])):
                engine.model.train(was_training)
                raise EvaluationStoppedError
            for name, value in task.measure(engine.model, engine.to_device(micro.batch)).items():
                if name in objects:
                    if micro.counts:
                        objects[name].update(*value)
                        updated = True
                    continue
                if not isinstance(value, Ratio):
                    raise UsageError(
                        f"The task's measure() returned {type(value).__name__} for {name!r}; "
                        "return a Ratio(sum, count), or name a torchmetrics object in metrics()."
                    )
                if name not in totals:
                    names.append(name)
                    totals[name] = torch.zeros(2, dtype=torch.float64, device=engine.device)
                if micro.counts:
                    totals[name] += torch.stack(
                        [torch.as_tensor(part, device=engine.device).double() for part in value]
                    )
    engine.model.train(was_training)
    if objects and engine.sum_ints([int(updated)])[0] < engine.world_size:
        raise UsageError(
            f"The evaluation data has fewer samples than the {engine.world_size} ranks, which "
            f"the torchmetrics objects of the task's metrics() ({', '.join(objects)}) cannot bear; "
            "use fewer ranks, or more samples."
        )
    summed = {name: tuple(engine.sum(totals[name]).tolist()) for name in sorted(names)}
    metrics = {name: _divide(*summed[name]) for name in names}
    metrics |= {name: float(metric.compute()) for name, metric in objects.items()}
    return metrics | task.derive(summed)


def _divide(total: float, count: float) -> float:
    return total / count if count else float("nan")
