"""Exact conversion of epochs to steps."""

from __future__ import annotations

from fractions import Fraction

import pytest

from train.data.epochs import completes, samples_in, steps_in

EPOCHS = (0.01, 0.1, 0.3, 0.55, 0.7, 1.0, 1.1, 2.3, 1e-7, 3.3333)
SIZES = (1, 3, 10, 100, 1437)
BATCHES = (1, 3, 8, 32, 200)
GRID = [(epochs, size, batch) for epochs in EPOCHS for size in SIZES for batch in BATCHES]


def typed(epochs: float) -> Fraction:
    """The number that a user writes in a config, as an exact decimal."""
    return Fraction(round(epochs * 10**10), 10**10)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("0.55", Fraction(11, 20)), ("1e-7", Fraction(1, 10**7)), ("1e+16", 10**16), ("3", 3)],
)
def test_a_number_has_the_exact_decimal_value(text: str, fraction: Fraction) -> None:
    assert samples_in(float(text), 700) == fraction * 700


@pytest.mark.parametrize(
    ("samples", "size"), [(300, 103), (500, 600), (83_200, 10_000_019), (1, 3), (5, 6)]
)
def test_a_computed_ratio_gives_back_the_number_of_samples(samples: int, size: int) -> None:
    assert samples_in(samples / size, size) == samples
    assert samples_in(samples / size, 6 * size) == 6 * samples


def test_a_run_has_the_fewest_steps_that_complete_its_epochs() -> None:
    for epochs, size, batch in GRID:
        steps, samples = steps_in(epochs, size, batch), typed(epochs) * size
        assert steps * batch >= samples > (steps - 1) * batch, (epochs, size, batch)


def test_steps_that_complete_epochs_match_a_direct_computation() -> None:
    for epochs, size, batch in GRID:
        period = typed(epochs) * size
        if period <= batch:
            expected = list(range(1, 101))
        else:
            ends = [times * period for times in range(1, 100 * batch // int(period) + 2)]
            expected = [
                step
                for step in range(1, 101)
                if any((step - 1) * batch < end <= step * batch for end in ends)
            ]
        every = samples_in(epochs, size)
        found = [step for step in range(1, 101) if completes(every, step * batch, batch)]
        assert found == expected, (epochs, size, batch)


@pytest.mark.parametrize("times", [1, 2, 7, 10])
def test_the_last_step_of_whole_periods_completes_one(times: int) -> None:
    for epochs, size, batch in GRID:
        last = steps_in(float(typed(epochs) * times), size, batch)
        assert completes(samples_in(epochs, size), last * batch, batch), (epochs, size, batch)


def test_steps_after_a_change_of_the_batch_size_complete_the_epochs() -> None:
    # 10 steps of 8 samples; then 120 of 200 samples are left for steps of 50.
    assert steps_in(2, 100, 50, step=10, position=80) == 10 + 3
    assert steps_in(2, 100, 8, step=10, position=80) == steps_in(2, 100, 8) == 25
    assert steps_in(2, 100, 50, step=30, position=240) == 30
