"""How the samples of a step, and the evaluation data, are divided among ranks."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from train.data.plan import BatchConfig, BatchPlan, EvalPlan
from train.exits import UsageError
from train.section import changes_results


def make(batch, micro, world):
    try:
        return BatchPlan(batch, micro, world)
    except UsageError:
        return None


@given(st.integers(1, 200), st.integers(1, 50) | st.none(), st.integers(1, 16))
def test_every_position_of_a_step_is_in_exactly_one_cell(batch, micro, world):
    plan = make(batch, micro, world)
    assume(plan is not None)
    cells = [
        range(*plan.bounds(rank, number))
        for number in range(plan.accumulation)
        for rank in range(world)
    ]
    assert [position for cell in cells for position in cell] == list(range(batch))
    sizes = {len(cell) for cell in cells}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) == plan.largest_micro_batch <= (micro or batch)


def test_accumulation_follows_from_the_sizes():
    assert BatchPlan(64, 8, 2).accumulation == 4
    assert BatchPlan(64, None, 2).accumulation == 1
    assert BatchPlan(10, 4, 1).accumulation == 3


@given(st.integers(1, 60), st.integers(1, 12) | st.none(), st.integers(2, 32))
@example(3, 1, 4)
@example(17, 1, 8)
@example(1, None, 2)
def test_an_error_names_the_nearest_valid_sizes(batch, micro, world):
    assume(make(batch, micro, world) is None and (micro or 1) <= batch)
    with pytest.raises(UsageError, match=rf"batch.global_batch_size is {batch},") as error:
        BatchPlan(batch, micro, world)
    advice = re.search(r"set it to (\d+)(?: or (\d+))?\.$", str(error.value)).groups()
    sizes = [int(size) for size in advice if size]
    assert all(make(size, micro, world) for size in sizes)
    below = sizes[0] if sizes[0] < batch else 0
    assert below < batch < sizes[-1]
    assert not any(make(size, micro, world) for size in range(below + 1, sizes[-1]))


@pytest.mark.parametrize("micro", [0, -1, True, "all"])
def test_invalid_micro_batch_sizes_are_refused(micro):
    with pytest.raises(ValueError, match="micro_batch_size"):
        BatchConfig(global_batch_size=8, micro_batch_size=micro)


def test_only_the_global_batch_size_changes_results():
    fields = BatchConfig.model_fields
    assert changes_results(fields["global_batch_size"].json_schema_extra)
    assert not changes_results(fields["micro_batch_size"].json_schema_extra)
    assert BatchPlan.from_config(BatchConfig(global_batch_size=8), 2) == BatchPlan(8, None, 2)


def test_a_micro_batch_larger_than_the_batch_is_refused():
    with pytest.raises(UsageError, match=r"batch\.micro_batch_size is 9"):
        BatchPlan(8, 9, 1)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 9))
def test_evaluation_uses_each_sample_once_in_equal_rounds(size, micro, world):
    plan = EvalPlan(size, micro, world)
    shares = [
        range(*plan.bounds(rank, number)) for number in range(plan.rounds) for rank in range(world)
    ]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert all(len(share) <= micro for share in shares)
    for number in range(plan.rounds):
        lengths = [len(range(*plan.bounds(rank, number))) for rank in range(world)]
        assert max(lengths) - min(lengths) <= 1, "ranks differ in their number of rounds"
