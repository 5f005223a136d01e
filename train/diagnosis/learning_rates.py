"""The learning-rate range test (Smith, 2017, "Cyclical Learning Rates for Training Neural
Networks"): the learning rate grows with each step while the loss is watched.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.diagnosis.bench import Bench

_REACH = 4
"""Steps before and after one over which its loss is averaged, with weights that fall to both sides:
unlike an average of earlier steps alone it does not shift the curve to larger rates."""
_SPAN = 3
"""Steps before and after one between which the slope is taken."""
_DIVERGED = 3.0
"""The test ends where the loss is above the lowest one by this many times the decrease so far, or
this many times the lowest one."""


class Tried(NamedTuple):
    """One step of the test."""

    learning_rate: float
    loss: float


class Found(NamedTuple):
    """What the test says."""

    suggestion: float | None
    """A base learning rate; None where the loss does not fall."""
    reason: str
    """One or two sentences."""


def sweep(bench: Bench, lo: float, hi: float, steps: int) -> list[Tried]:
    """Takes up to ``steps`` steps with learning rates from ``lo`` to ``hi``, equal factors apart;
    ends early where the loss diverges. Collective; the same on all ranks."""
    factor = (hi / lo) ** (1.0 / (steps - 1))
    taker = bench.steps(lambda step: lo * factor**step)
    tried: list[Tried] = []
    with bench.batches(steps) as batches:
        for _ in range(steps):
            taken = taker.take([next(batches) for _ in range(bench.plan.accumulation)])
            if not taken.is_finite:
                break
            tried.append(Tried(taken.learning_rate, taken.loss))
            if has_diverged([t.loss for t in tried]):
                break
    return tried


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the newest losses are far above the lowest ones."""
    if len(losses) < 2 * _REACH:
        return False
    averages = smooth(losses)[: -_REACH // 2]
    lowest, newest = min(averages), statistics.fmean(losses[-_REACH // 2 :])
    return newest > lowest + _DIVERGED * max(averages[0] - lowest, abs(lowest))


def smooth(losses: Sequence[float]) -> list[float]:
    """Each loss averaged with those around it."""
    found = []
    for index in range(len(losses)):
        around = range(max(0, index - _REACH), min(len(losses), index + _REACH + 1))
        weights = [1.0 + _REACH - abs(other - index) for other in around]
        total = sum(w * losses[other] for w, other in zip(weights, around, strict=True))
        found.append(total / sum(weights))
    return found


def judge(tried: Sequence[Tried], lo: float, hi: float, steps: int) -> Found:
    """Suggests the rate of the steepest decrease of the smoothed loss over the logarithm of the
    rate, before its minimum."""
    is_cut = len(tried) < steps
    diverged = is_cut and has_diverged([t.loss for t in tried])
    if not tried:
        return Found(
            None,
            "The loss or the gradient norm is not finite in the first step, whatever the learning "
            "rate. Look for the cause with `isorun overfit`.",
        )
    at = f"{tried[-1].learning_rate:.3g}"
    cut = f"diverges at {at}" if diverged else f"is not finite after step {len(tried)}, at {at}"
    if len(tried) < 3:
        return Found(
            None,
            f"The loss {cut}. Set a smaller --lo, or look for the cause with `isorun overfit`.",
        )
    rates, losses = [t.learning_rate for t in tried], [t.loss for t in tried]
    smoothed = smooth(losses)
    lowest = min(range(len(tried)), key=lambda index: smoothed[index])
    slopes = list(_slopes(rates[: lowest + 1], smoothed))
    # A decrease that is less than the differences between steps says nothing.
    noise = statistics.fmean(abs(x - y) for x, y in itertools.pairwise(losses[: lowest + 2]))
    if not slopes or smoothed[0] - smoothed[lowest] <= noise:
        if is_cut and (diverged or smoothed[-1] - smoothed[lowest] > noise):
            return Found(
                None,
                f"The loss rises from the start and {cut}; set a smaller --lo, or look for the "
                "cause with `isorun overfit`.",
            )
        if is_cut:
            return Found(
                None,
                f"The loss {cut}, without a rise before: a sample may be broken, so look at the "
                "data; else set a smaller --lo.",
            )
        return Found(
            None,
            f"The loss does not fall between {lo:.3g} and {rates[-1]:.3g} by more than it differs "
            f"from step to step ({noise:.2g}). Set a larger --hi or more --steps, or look for the "
            "cause with `isorun overfit`.",
        )
    steepest, minimum = rates[min(slopes)[1]], rates[lowest]
    reason = (
        f"The loss falls fastest at {steepest:.2g} and is lowest at {minimum:.2g}: from "
        f"{smoothed[0]:.4g} to {smoothed[lowest]:.4g}."
    )
    if is_cut:
        reason += f" It {cut}."
    elif lowest >= len(tried) - 1 - _REACH:
        reason += f" It still falls at --hi, {hi:.3g}: a larger --hi may show a larger rate."
    return Found(steepest, reason)


def _slopes(rates: Sequence[float], smoothed: Sequence[float]) -> Iterator[tuple[float, int]]:
    """The change of the loss per factor e of the rate, with the index."""
    for index in range(_SPAN, len(rates) - _SPAN):
        before, after = index - _SPAN, index + _SPAN
        change = smoothed[after] - smoothed[before]
        yield change / math.log(rates[after] / rates[before]), index
