"""A trial of a batch plan: steps with a model of its own, to see what they need."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.config.schema import Config
from train.data.plan import BatchPlan
from train.distributed.collectives import Collectives
from train.setup.build import TrainableModel
from train.setup.compile_check import check_compiled
from train.tasks.base import Task
from train.tasks.checked import count_of, loss_of


def free_device_memory(device: torch.device) -> None:
    """Gives back the memory of a trial, which nothing refers to any more, and forgets its peak: the
    peak that is logged is that of the run."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Trial:
    """Takes steps with a model of its own; dropping the trial drops the model."""

    def __init__(
        self,
        config: Config,
        task: Task,
        data: Any,
        build: Callable[[], TrainableModel],
        plan: BatchPlan,
    ) -> None:
        self._config, self._task, self._build, self._plan = config, task, build, plan
        self._data = data

    def alone(self) -> None:
        """Computes one micro-batch and keeps its gradients."""
        # The first samples, on every rank alike.
        samples = range(self._plan.largest_micro_batch)
        self._batch = self._task.collate([self._data[i % len(self._data)] for i in samples])
        self._model = self._build()
        strategy = self._model.strategy
        if self._config.compile:
            batch = strategy.engine.to_device(self._batch)
            alone = Collectives(rank=0, world_size=1)
            collectives = strategy.collectives if strategy.shards_parameters else alone
            check_compiled(
                self._task,
                strategy.call,
                strategy.bare_model,
                batch,
                self._config.precision,
                collectives,
            )
        strategy.zero_grad()
        self._micro_batch(last=False)

    def together(self) -> None:
        """Takes two steps, so that the optimiser's state and the gradients of earlier
        micro-batches are in memory as well."""
        accumulates = self._plan.accumulation > 1
        for step in range(2):
            loss_sum = self._micro_batch(last=step == 0 or not accumulates)
            if step == 1 and accumulates:
                loss_sum += self._micro_batch(last=True)
            self._update(loss_sum)

    def micro_batch(self) -> None:
        """Computes a micro-batch that is not the last one of its step."""
        self._micro_batch(last=False)

    def last_micro_batch(self) -> None:
        """Computes the last micro-batch of a step, and takes the optimiser step; collective."""
        self._update(self._micro_batch(last=True))

    def _update(self, loss_sum: Tensor) -> None:
        strategy = self._model.strategy
        wait_for_loss_sum = strategy.collectives.start_all_reduce(loss_sum)
        strategy.step(wait_for_loss_sum, self._config.optim.clip_norm)
        strategy.zero_grad()

    def _micro_batch(self, *, last: bool) -> Tensor:
        """The loss sum of a micro-batch whose gradients are added; the ranks exchange them at the
        ``last`` one of a step."""
        strategy = self._model.strategy
        count = count_of(self._task, self._batch) * strategy.engine.world_size
        with strategy.accumulating(last=last):
            batch = strategy.engine.to_device(self._batch)
            loss = strategy.call_for_backward(partial(loss_of, self._task, batch=batch))
            strategy.backward(loss.sum, count)
        return torch.as_tensor(loss.sum.detach())
