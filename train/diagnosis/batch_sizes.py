"""What micro-batches of different sizes need: memory, and time for the samples of a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from train.data.plan import BatchPlan
from train.diagnosis.memory import PeakMemory
from train.exits import OutOfMemoryError, RetryError
from train.setup.batch_size_finder import NOTHING_FITS, BatchSizeFinder
from train.setup.trial_step import Trial
from train.strategies.engine import Engine

_log = logging.getLogger("train")
_REPEATS = 3
_ALIKE = 0.98


class Tried(NamedTuple):
    """A size of micro-batches."""

    micro_batch_size: int
    """Samples of the largest micro-batch."""
    accumulation: int
    """Micro-batches of a rank in a step."""
    memory: int | None
    """Peak in bytes, of the rank with the highest; None where the size does not fit."""
    samples_per_second: float | None
    """Of all ranks, without loading data."""

    @property
    def fits(self) -> bool:
        """Whether all ranks have taken steps with it."""
        return self.memory is not None


def try_sizes(finder: BatchSizeFinder, engine: Engine, most: int | None = None) -> list[Tried]:
    """Tries micro-batches of 1, 2, 4 ... samples up to a rank's whole share of a step, or up to
    ``most``; where one does not fit, also sizes in between. Collective; sizes in rising order.

    Raises OutOfMemoryError where micro-batches of one sample do not fit.
    """
    plans = [p for p in finder.plans() if most is None or p.largest_micro_batch <= most]
    found: list[Tried] = []
    fits: BatchPlan | None = None
    too_large: BatchPlan | None = None
    try:
        for plan in plans:
            found.append(_try(finder, engine, plan))
            if not found[-1].fits:
                too_large = plan
                break
            fits = plan
        if fits is None:
            raise OutOfMemoryError(NOTHING_FITS)
        while too_large and (middle := finder.between(fits, too_large)):
            found.append(_try(finder, engine, middle))
            fits, too_large = (middle, too_large) if found[-1].fits else (fits, middle)
    except RetryError as error:  # the process groups cannot be used any more
        if not found:
            raise
        _log.warning("%s", str(error).replace("rerun to try smaller ones", "larger ones are left"))
    return sorted(found, key=lambda tried: tried.micro_batch_size)


def _try(finder: BatchSizeFinder, engine: Engine, plan: BatchPlan) -> Tried:
    memory, own = PeakMemory(engine.device), [0.0, 0.0]
    memory.reset()

    def measure(trial: Trial) -> None:
        between = _seconds(trial.micro_batch, engine.device) if plan.accumulation > 1 else 0.0
        last = _seconds(trial.last_micro_batch, engine.device)
        own[:] = [(plan.accumulation - 1) * between + last, float(memory.peak())]

    size = plan.largest_micro_batch
    if not finder.try_out(plan, measure):
        return Tried(size, plan.accumulation, None, None)
    by_rank = engine.collectives.all_gather_floats(own)
    seconds, peak = (max(values) for values in zip(*by_rank, strict=True))
    return Tried(size, plan.accumulation, int(peak), plan.global_batch_size / max(seconds, 1e-9))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """The shortest of some calls."""
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def fastest(tried: Sequence[Tried]) -> Tried:
    """The smallest size with nearly the highest throughput."""
    best = max(t.samples_per_second or 0.0 for t in tried)
    return next(t for t in tried if (t.samples_per_second or 0.0) >= _ALIKE * best)
