"""One optimiser step: forward and backward over its micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from train.data.fetch import MicroBatch
from train.data.order import micro_batch_seed
from train.distributed.randomness import seed_everything
from train.goodput.phases import Phase
from train.loop.first_step import FirstStepChecks
from train.loop.step_agreement import Agreed
from train.optim.ema import Ema
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import set_learning_rate
from train.optim.spikes import SpikeGuard, judge_finite
from train.strategies.base import StepResult, Strategy
from train.tasks.base import Task
from train.tasks.checked import count_of, loss_of


class StepTaken(NamedTuple):
    """A completed step."""

    result: StepResult
    agreed: Agreed
    learning_rate: float
    """That of parameters without a factor of their own."""


class TrainStep:
    """Takes the steps of a run; everything that a step uses is an argument here.

    ``schedule`` gives the factor on ``optim.lr`` for a step counted from 0, ``seed`` is the run's,
    ``spikes`` judges the steps, ``agree`` starts the exchange of a step (``StepAgreement.start``),
    ``timed`` adds the seconds of its body to a phase, ``beat`` tells the watchdog what this rank
    does.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        *,
        optim: OptimConfig,
        schedule: Callable[[int], float],
        seed: int,
        ema: Ema | None,
        spikes: SpikeGuard | None,
        agree: Callable[[int], Callable[[], Agreed]],
        timed: Callable[[Phase], AbstractContextManager[None]],
        beat: Callable[[str], None],
    ) -> None:
        self._task, self._strategy, self._ema = task, strategy, ema
        self._optim, self._schedule, self._seed = optim, schedule, seed
        self._spikes = spikes
        self._agree, self._timed, self._beat = agree, timed, beat

    def take(
        self,
        micro_batches: Sequence[MicroBatch],
        step: int,
        checks: FirstStepChecks | None = None,
    ) -> StepTaken | None:
        """Takes the step after ``step`` completed ones; collective.

        The gradient is that of (sum of losses over the global batch) / (global count), for any
        number of ranks and micro-batches. Returns None where the ranks agreed to stop, or where the
        step before is a spike that ends the run: then weights, gradients and buffers are as they
        were before.
        """
        task, strategy = self._task, self._strategy
        to_device = strategy.engine.to_device
        if checks:
            checks.before_forward(to_device(micro_batches[0].batch))
        learning_rate = self._optim.lr * self._schedule(step)
        set_learning_rate(strategy.optimizer, learning_rate)
        strategy.zero_grad()
        strategy.sync_buffers()
        count = sum(count_of(task, micro.batch) for micro in micro_batches)
        loss_sum = torch.zeros((), device=strategy.engine.device)
        for micro in micro_batches:
            pending_agreement = self._agree(count)  # runs beside the forward pass
            self._beat("computing a micro-batch")
            last = micro is micro_batches[-1]
            # The model's random numbers depend on what is computed, not on the rank or the time.
            seed = micro_batch_seed(self._seed, int(micro.positions[0]))
            seed_everything(seed, strategy.engine.device)
            with strategy.accumulating(last=last):
                checked = checks.during_forward() if checks else nullcontext()
                with self._timed("forward"), checked:
                    batch = to_device(micro.batch)
                    loss = strategy.call_for_backward(partial(loss_of, task, batch=batch))
                with self._timed("wait"):
                    agreed = pending_agreement()
                after_spike = micro is micro_batches[0] and self._spikes and self._spikes.ends_run()
                if agreed.stop or after_spike:
                    strategy.undo_forward()
                    return None
                loss_sum += loss.sum.detach()
                if last:  # runs beside the backward pass
                    wait_for_loss_sum = strategy.collectives.start_all_reduce(loss_sum)
                if checks:
                    checks.before_backward(loss.sum)
                self._beat("computing gradients")
                strategy.backward(loss.sum, agreed.global_count)
            if checks:
                checks.after_micro_batch(micro.batch, loss.count)
        if checks:
            checks.after_backward()
        self._beat("taking the optimiser step")
        judge = judge_finite
        if self._spikes:
            judge = partial(self._spikes.judge, count=agreed.global_count)
        result = strategy.step(wait_for_loss_sum, self._optim.clip_norm, judge)
        if self._ema:
            self._ema.update(result.skipped)
        return StepTaken(result, agreed, learning_rate)
