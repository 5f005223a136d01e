"""Epochs in steps, computed with exact fractions: 0.55 epochs are 55/100 of the training data."""

from __future__ import annotations

import math
from fractions import Fraction


def samples_in(epochs: float, dataset_size: int) -> Fraction:
    """How many samples ``epochs`` passes over the training data are, not rounded.

    ``epochs`` stands for the decimal number that prints it, which is what the user typed, and
    not for the binary number nearest to it. A number of 16 or more digits is a ratio that was
    computed, such as 300 / 103: it stands for the fraction that rounds to it.
    """
    exact = Fraction(str(epochs))
    if float(f"{epochs:.15g}") != epochs:
        ratio = exact.limit_denominator(max(dataset_size, 1000))
        exact = ratio if float(ratio) == epochs else exact
    return exact * dataset_size


def steps_in(
    epochs: float, dataset_size: int, batch_size: int, *, step: int = 0, position: int = 0
) -> int:
    """The first step, from 1, after which ``epochs`` passes are complete. ``step`` steps have taken
    ``position`` samples already, perhaps in batches of another size."""
    left = samples_in(epochs, dataset_size) - position
    return step + max(0, math.ceil(left / batch_size))


def completes(every: Fraction, position: int, batch_size: int) -> bool:
    """Whether another multiple of ``every`` samples (of ``samples_in``) is complete after the step
    that ends at ``position`` of the stream, and was not before it."""
    return position // every > (position - batch_size) // every
