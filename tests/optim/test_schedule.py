"""Schedules are pure functions of the step."""

import itertools
import math

import pytest
from pydantic import ValidationError

from train.optim.schedule import ScheduleConfig, learning_rate_factor


def factors(total=100, **values):
    factor = learning_rate_factor(ScheduleConfig(**values), total)
    return [factor(step) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_one():
    for use in ("constant", "linear", "cosine", "wsd"):
        assert factors(use=use, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_constant():
    assert set(factors(use="constant")) == {1.0}


def test_linear_ends_at_the_final_ratio():
    values = factors(use="linear", final_ratio=0.1)
    assert (values[0], values[-1]) == pytest.approx((1.0, 0.1))
    steps = [a - b for a, b in itertools.pairwise(values)]
    assert steps == pytest.approx([0.9 / 99] * 99)


def test_cosine_follows_its_formula():
    values = factors(use="cosine", warmup_steps=10, final_ratio=0.2)
    for step in (10, 40, 99):
        angle = math.pi * (step - 10) / 89
        assert values[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(angle)) / 2)


def test_wsd_is_stable_and_then_decays():
    values = factors(use="wsd", warmup_steps=5, decay_steps=20)
    assert set(values[5:81]) == {1.0}
    assert values[-1] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(values[80:]))


def test_step_counts_from_the_end_of_warm_up():
    values = factors(use="step", step_size=30, gamma=0.5, warmup_steps=10)
    assert (values[10], values[39], values[40], values[70]) == (1.0, 1.0, 0.5, 0.25)


def test_cosine_restarts_at_the_start_of_each_period():
    values = factors(use="cosine_restarts", warmup_steps=10, restart_steps=20, final_ratio=0.1)
    assert values[10] == values[30] == values[90] == 1.0
    assert values[29] == values[89] == pytest.approx(0.1)
    assert values[10:30] == values[30:50] == factors(20, use="cosine", final_ratio=0.1)


def test_the_periods_of_restarts_may_grow():
    values = factors(200, use="cosine_restarts", restart_steps=10, restart_growth=1.5)
    starts = [step for step, value in enumerate(values) if value == 1.0]
    assert starts == [0, 10, 25, 47, 81, 132]  # periods of 10, 15, 22, 34, 51, ...
    assert factors(50, use="cosine_restarts", restart_steps=1)[49] == 1.0


def test_restarts_without_a_period_are_refused():
    with pytest.raises(ValidationError, match="restart_steps"):
        ScheduleConfig(use="cosine_restarts")


def test_step_without_a_size_is_refused():
    with pytest.raises(ValidationError, match="step_size"):
        ScheduleConfig(use="step")


@pytest.mark.parametrize("use", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_one_step_works(use):
    assert factors(total=1, use=use) == [1.0]
