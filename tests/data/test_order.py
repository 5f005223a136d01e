"""I1: the sample at a position is a pure function of the seed and the position."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import chdtrc

from tests.support.lanes import slow
from train.data.order import (
    SampleOrder,
    dataset_seed,
    initial_seed,
    micro_batch_seed,
    module_seed,
    report_seed,
    sample_seed,
)

MASK = 2**64 - 1
SEEDS = st.integers(0, 2**63 - 1)


def mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def chain(*words):
    state = 0
    for word in words:
        state = mix(((state ^ word) + 0x9E3779B97F4A7C15) & MASK)
    return state


def scalar_index(seed, size, position):
    """The same order for a single position, in plain integers."""
    epoch, value = divmod(position, size)
    half = max(3, math.ceil((size - 1).bit_length() / 2))
    key = mix(chain(1, seed) ^ mix(epoch * 0x9E3779B97F4A7C15 & MASK))
    while True:
        left, right = value >> half, value % 2**half
        for number in range(12):
            round_key = mix((key + number * 0x9E3779B97F4A7C15) & MASK)
            left, right = right, left ^ (mix((right + round_key) & MASK) % 2**half)
        value = left << half | right
        if value < size:
            return value


@given(SEEDS, st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=60)
def test_each_epoch_is_a_permutation(seed, size, epoch):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    epochs, indices = SampleOrder(seed, size).keys(positions)
    assert set(epochs.tolist()) == {epoch}
    assert sorted(indices.tolist()) == list(range(size))


@given(SEEDS, st.integers(1, 3000), st.integers(0, 10**12), st.integers(1, 200))
@settings(max_examples=60)
def test_a_window_can_begin_anywhere(seed, size, epoch, cut):
    cut = cut % size
    order, start = SampleOrder(seed, size), epoch * size
    epochs, indices = order.keys(np.arange(start + cut, start + cut + 2 * size))
    assert epochs.tolist() == sorted(
        [epoch] * (size - cut) + [epoch + 1] * size + [epoch + 2] * cut
    )
    assert sorted(indices[size - cut : 2 * size - cut].tolist()) == list(range(size))
    head = order.keys(np.arange(start, start + cut))[1]
    assert sorted([*head.tolist(), *indices[: size - cut].tolist()]) == list(range(size))


@given(SEEDS, st.integers(1, 2**48), st.integers(0, 2**63 - 1))
@settings(max_examples=150)
def test_it_agrees_with_a_scalar_version(seed, size, position):
    epochs, indices = SampleOrder(seed, size).keys(np.array([position]))
    assert (epochs[0], indices[0]) == (position // size, scalar_index(seed, size, position))


@pytest.mark.parametrize(
    ("seed", "size", "position", "expected"),
    [
        (0, 10, 0, [5, 9, 1, 0, 6, 4]),
        (1, 10, 7, [6, 5, 1, 1, 9, 7]),
        (2**63 - 1, 1000, 995, [256, 909, 344, 883, 513, 502]),
        (
            42,
            2**48,
            10**12,
            [
                199298332916762,
                1830749082451,
                68390004019233,
                209715752534953,
                28798836283989,
                90026349899980,
            ],
        ),
    ],
)
def test_known_answers(seed, size, position, expected):
    """Must not change: another order would change every run that is resumed."""
    positions = range(position, position + 6)
    assert SampleOrder(seed, size).keys(np.array(positions))[1].tolist() == expected
    assert [scalar_index(seed, size, p) for p in positions] == expected


def test_any_part_of_the_stream_can_be_computed():
    order = SampleOrder(3, 97)
    whole = order.keys(np.arange(1000))[1]
    for start, stop in ((0, 1), (90, 110), (500, 777)):
        assert (order.keys(np.arange(start, stop))[1] == whole[start:stop]).all()
    shape = np.arange(12).reshape(3, 4)
    assert (order.keys(shape)[1] == whole[:12].reshape(3, 4)).all()


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_position_may_be_a_scalar(size):
    """A regression test: this was an endless loop."""
    order = SampleOrder(2, size)
    for position in range(20):
        epoch, index = order.keys(np.asarray(position))
        assert epoch.shape == index.shape == ()
        assert (epoch, index) == tuple(int(k[0]) for k in order.keys(np.array([position])))
    assert order.keys(np.arange(0))[1].shape == (0,)


def test_memory_does_not_grow_with_size_or_position():
    tracemalloc.start()
    SampleOrder(0, 2**48).keys(np.arange(10**12, 10**12 + 64))
    SampleOrder(0, 2**47 + 1).keys(np.arange(2**62, 2**62 + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_epochs_and_seeds_differ():
    one = SampleOrder(0, 100).keys(np.arange(300))[1].reshape(3, 100)
    other = SampleOrder(1, 100).keys(np.arange(100))[1]
    rows = [*one.tolist(), other.tolist()]
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize("size", [2, slow(3), 4, slow(5), slow(6)])
def test_all_permutations_of_a_few_samples_are_equally_frequent(size):
    epochs = 50_000
    rows = SampleOrder(5, size).keys(np.arange(size * epochs))[1].reshape(-1, size)
    counts = Counter(map(tuple, rows.tolist()))
    expected = epochs / math.factorial(size)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == math.factorial(size)
    assert chdtrc(math.factorial(size) - 1, statistic) > 1e-4


@pytest.mark.slow
@pytest.mark.normal
def test_all_permutations_are_equally_frequent_over_seeds():
    """The first epoch of many runs."""
    rows = [SampleOrder(seed, 3).keys(np.arange(3))[1] for seed in range(300)]
    counts = Counter(tuple(row.tolist()) for row in rows)
    statistic = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert len(counts) == 6
    assert chdtrc(5, statistic) > 1e-4


def test_each_sample_is_equally_frequent_at_each_place():
    size, epochs = 100, 5000
    rows = SampleOrder(6, size).keys(np.arange(size * epochs))[1].reshape(-1, size)
    cells = np.stack([np.bincount(rows[:, place], minlength=size) for place in range(size)])
    statistic = ((cells - epochs / size) ** 2 / (epochs / size)).sum()
    assert 1e-4 < chdtrc((size - 1) ** 2, statistic) < 1 - 1e-4


def test_neighbouring_indices_are_not_correlated():
    indices = SampleOrder(7, 10_000).keys(np.arange(10_000))[1].astype(float)
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(indices, np.arange(10_000))[0, 1]) < 0.04


def test_without_shuffling_epochs_repeat_in_order():
    assert SampleOrder(0, 3, shuffle=False).keys(np.arange(7))[1].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_dataset_of_one_sample():
    epochs, indices = SampleOrder(0, 1).keys(np.arange(3))
    assert (epochs.tolist(), indices.tolist()) == ([0, 1, 2], [0, 0, 0])


@pytest.mark.parametrize("size", [0, -1, 2**48 + 1])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match="from 1 to 2"):
        SampleOrder(0, size)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="must not be negative, but one is -3"):
        SampleOrder(0, 5).keys(np.array([4, -3]))


def test_seeds_of_different_purposes_are_distinct():
    seeds = {
        sample_seed(seed, epoch, index)
        for seed in range(10)
        for epoch in range(10)
        for index in range(100)
    }
    seeds |= {micro_batch_seed(seed, position) for seed in range(10) for position in range(1000)}
    names = [f"layers.{number}" for number in range(100)]
    seeds |= {module_seed(seed, name) for seed in range(10) for name in ["", *names]}
    for use in (dataset_seed, initial_seed, report_seed):
        seeds |= {use(seed) for seed in range(10)}
    assert len(seeds) == 21_040


@pytest.mark.parametrize(
    ("found", "words", "expected"),
    [
        (sample_seed(0, 0, 0), (2, 0, 0, 0), 10422960368320252623),
        (sample_seed(1, 2, 3), (2, 1, 2, 3), 18283258009843326564),
        (sample_seed(7, -1, 2**48 - 1), (2, 7, MASK, 2**48 - 1), 16167157080320363369),
        (micro_batch_seed(0, 0), (3, 0, 0), 6084141021458535187),
        (micro_batch_seed(1, 2), (3, 1, 2), 12751488248376797752),
        (micro_batch_seed(2**63 - 1, 10**12), (3, 2**63 - 1, 10**12), 585756163644079688),
        (initial_seed(0), (4, 0), 11553561497916274123),
        (initial_seed(2**63 - 1), (4, 2**63 - 1), 2995589087249998439),
        (module_seed(5, "layers.0"), (4, 5, 16815568033298339095), 15410218658039876178),
        (report_seed(3), (5, 3), 7485121835981390325),
    ],
)
def test_known_seeds(found, words, expected):
    """Must not change: augmentation, dropout and initial values follow from them."""
    assert found == chain(*words) == expected
