"""The dynamic loss scale of fp16: its value at each step, and what a checkpoint stores."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from train.strategies.loss_scale import LossScale

INTERVAL = 2000


def take(scale: LossScale, steps: int, *, skipped: bool = False) -> None:
    for _ in range(steps):
        scale.update(skipped=skipped)


def test_the_scale_starts_at_65536_and_halves_with_each_skipped_step() -> None:
    scale = LossScale()
    assert scale.value == 65536
    take(scale, 3, skipped=True)
    assert scale.value == 8192


def test_the_scale_doubles_after_2000_finite_steps_in_a_row() -> None:
    scale = LossScale()
    take(scale, INTERVAL - 1)
    assert scale.value == 65536
    take(scale, 1)
    assert scale.value == 131072
    take(scale, INTERVAL - 1)
    assert scale.value == 131072
    take(scale, 1)
    assert scale.value == 262144


def test_a_skipped_step_resets_the_count_of_finite_steps() -> None:
    scale = LossScale()
    take(scale, INTERVAL - 1)
    take(scale, 1, skipped=True)
    take(scale, INTERVAL - 1)
    assert scale.value == 32768
    take(scale, 1)
    assert scale.value == 65536


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40), st.integers(0, INTERVAL - 1))
def test_a_resumed_run_continues_with_the_same_values(
    skipped: list[bool], cut: int, before: int
) -> None:
    whole, first, second = LossScale(), LossScale(), LossScale()
    start = {"value": 1024.0, "steps_since": before}
    whole.load_state_dict(start)
    first.load_state_dict(start)
    values = []
    for step in skipped:
        whole.update(skipped=step)
        values.append(whole.value)
    found = []
    for step in skipped[:cut]:
        first.update(skipped=step)
        found.append(first.value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in skipped[cut:]:
        second.update(skipped=step)
        found.append(second.value)
    assert found == values
