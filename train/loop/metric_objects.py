"""The torchmetrics objects of a task: their states merged over ranks, their values as numbers.

torchmetrics' own synchronisation is off. It gathers list states element by element, so it hangs
where ranks have made another number of updates, and it adds the initial state of a rank without
any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.distributed.collectives import Collectives
from train.exits import UsageError
from train.tasks.base import Task
from train.tasks.checked import metrics_of, numbers_of

_MOST = 1000
"""Numbers of one metric: each is logged by a name of its own."""


class _State(NamedTuple):
    """The state of one metric on one rank."""

    updates: int
    values: dict[str, Any]
    """Tensors (on the host) and lists, by name."""


class MetricObjects:
    """The torchmetrics objects of one evaluation, by name, without any update."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._device = device
        self._objects = {name: metric.to(device) for name, metric in metrics_of(task).items()}
        self._updated: set[str] = set()
        for metric in self._objects.values():
            metric.reset()  # a task may return the same objects each time

    def __contains__(self, name: object) -> bool:
        return name in self._objects

    def update(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Passes the arguments of a micro-batch to the object ``name``."""
        self._objects[name].update(*arguments)
        self._updated.add(name)

    def compute(self, collectives: Collectives) -> dict[str, float]:
        """The values over all ranks; collective.

        A value that is a tensor, list, tuple or dict becomes one number per element, named by its
        index or key: ``name/0``, ``name/key``. An object without an update on any rank is NaN.
        Raises UsageError for what does not become numbers.
        """
        if not self._objects:
            return {}
        metrics = dict(self._metrics())
        for metric in metrics.values():
            metric.distributed_available_fn = lambda: False
        updated = self._updated
        before = [(m, {name: getattr(m, name) for name in m._reductions}) for m in metrics.values()]
        if collectives.world_size > 1:
            own = {path: _State(m.update_count, _on_host(m)) for path, m in metrics.items()}
            by_rank = collectives.all_gather_pickled((own, updated))
            updated = set().union(*(names for _, names in by_rank))
            for path, metric in metrics.items():
                by_path = [states[path] for states, _ in by_rank if path in states]
                self._merge(metric, by_path, path)
        found: dict[str, float] = {}
        try:
            for name, metric in self._objects.items():
                value = metric.compute() if name in updated else float("nan")
                found |= _numbers(name, value)
        finally:
            for metric, states in before:  # reset() expects a list where the merged state is none
                for name, state in states.items():
                    setattr(metric, name, state)
        return found

    def _metrics(self) -> Iterator[tuple[str, Any]]:
        """Each metric with a state, also inside collections and wrappers, with its path."""
        from torchmetrics import Metric, MetricCollection

        seen = set()
        for name, outer in self._objects.items():
            for path, module in outer.named_modules():
                if isinstance(module, MetricCollection):
                    module.values(copy_state=False)  # shares the states of a compute group
                if isinstance(module, Metric) and id(module) not in seen:
                    seen.add(id(module))
                    yield f"{name}.{path}" if path else name, module

    def _merge(self, metric: Any, states: list[_State], path: str) -> None:
        """Gives the metric the state of all ranks. A rank without updates has nothing to add."""
        from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean

        states = [state for state in states if state.updates] or states
        for name, reduce in metric._reductions.items():
            values = [state.values[name] for state in states]
            merged: Any
            if isinstance(values[0], list):
                merged = [item for items in values for item in items]
                if reduce is not None and (merged or reduce is not dim_zero_cat):
                    merged = reduce(merged)
            else:
                if reduce is dim_zero_mean and not all(map(values[0].equal, values)):
                    raise UsageError(
                        f"The state {name!r} of the metric {path!r} ({type(metric).__name__}) is "
                        "averaged over ranks (dist_reduce_fx='mean'), so its value depends on the "
                        "number of ranks; keep a sum and a count, reduced by 'sum'."
                    )
                try:
                    merged = torch.stack(values)
                except RuntimeError:
                    raise UsageError(
                        f"The state {name!r} of the metric {path!r} ({type(metric).__name__}) has "
                        "other shapes on other ranks, so it cannot be merged; declare it as a "
                        "list in add_state()."
                    ) from None
                merged = reduce(merged) if reduce is not None else merged
            setattr(metric, name, _moved(merged, self._device))
        metric._update_count = sum(state.updates for state in states)  # else compute() warns


def _on_host(metric: Any) -> dict[str, Any]:
    cpu = torch.device("cpu")
    return {name: _moved(getattr(metric, name), cpu) for name in metric._reductions}


def _moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


def _numbers(name: str, value: Any) -> dict[str, float]:
    """The numbers of a computed value, by name."""
    found = dict(_leaves(name, value))
    return numbers_of(found, "compute() of metrics()")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size > _MOST:
            raise UsageError(
                f"The metric {name!r} of the task's metrics() has {size:,} values, but each is "
                f"logged as a number of its own, and at most {_MOST:,} are; reduce it, by an "
                "average for instance, or return it as an image from report()."
            )
        value = value.item() if size == 1 else value.tolist()
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(f"{name}/{key}", item)
