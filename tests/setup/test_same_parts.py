"""Ranks that have built other data or another model than the others."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.ranks import on_ranks
from train.data.loader_config import LoaderConfig
from train.exits import UsageError
from train.setup.fingerprint import DataFingerprint
from train.setup.same_parts import check_same_data, check_same_model


def model(seed=0, width=4):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    layers.register_buffer("table", torch.arange(5))
    return layers


def check_models(*models):
    return on_ranks(len(models), lambda ranks: check_same_model(ranks, models[ranks.rank]))


def check_data(*datasets):
    """Checks the training data of each rank; all have the same evaluation data."""

    def check(ranks):
        named = {"train_dataset": datasets[ranks.rank], "eval_dataset": [{"x": 1}]}
        fingerprints = {n: DataFingerprint(d, 5, LoaderConfig()) for n, d in named.items()}
        return check_same_data(ranks, fingerprints)

    return on_ranks(len(datasets), check)


def assert_refused(found, *parts):
    assert all(type(each) is UsageError for each in found), found
    assert len({str(each) for each in found}) == 1
    for part in parts:
        assert part in str(found[0])


def test_models_of_one_seed_pass():
    assert check_models(model(), model(), model()) == [None] * 3
    with torch.device("meta"):
        assert check_models(model(), model(1)) == [None] * 2


@pytest.mark.parametrize("odd", range(3))
def test_another_model_is_named_with_its_rank(odd):
    models = [model(seed=int(rank == odd)) for rank in range(3)]
    assert_refused(check_models(*models), f"0.weight of rank {odd} (")


@pytest.mark.parametrize("change", ["shape", "buffer", "names", "dtype", "nan"])
def test_whatever_differs_between_models_is_refused(change):
    other = model(width=5 if change == "shape" else 4)
    if change == "buffer":
        other.table[3] = 7
    if change == "names":
        other.register_buffer("more", torch.ones(1))
    if change == "dtype":
        other[2].weight.data = other[2].weight.data.double()
    if change == "nan":
        other[1].running_mean.fill_(float("nan"))
    assert_refused(check_models(model(), other, model()), "rank 1 (")


def test_rounding_is_no_difference():
    other = model()
    other[0].weight.data *= 1 + 1e-4
    assert check_models(model(), other) == [None] * 2


def test_a_large_tensor_is_compared_without_a_copy():
    one, other = nn.Module(), nn.Module()
    one.register_buffer("large", torch.zeros(1100, 1000))
    other.register_buffer("large", torch.zeros(1100, 1000))
    assert check_models(one, other) == [None] * 2
    other.large += 1
    assert_refused(check_models(one, other), "large of rank 1 (")


SAMPLES = [
    {"x": torch.randn(3), "y": n, "name": f"file {n}", "z": np.arange(3.0) + n, "w": (0.5, [b"a"])}
    for n in range(9)
]


def test_the_same_data_passes():
    assert check_data(SAMPLES, list(SAMPLES), SAMPLES) == [[], [], []]
    assert check_data([object()] * 4, [object()] * 4) == [[], []]


@pytest.mark.parametrize("odd", range(3))
def test_another_length_is_named_with_its_rank(odd):
    found = check_data(*(SAMPLES[: 8 if rank == odd else 9] for rank in range(3)))
    assert_refused(found, f"train_dataset() has 8 samples on rank {odd} (", "9 samples on the")


@pytest.mark.parametrize(
    "change",
    [{"x": torch.zeros(3)}, {"y": 5}, {"name": "b"}, {"z": np.zeros(3)}, {"w": (0.7, [b"a"])},
     {"w": (0.5, [b"b"])}, {"x": torch.randn(4)}, {"more": 1}],
)  # fmt: skip
def test_another_sample_is_refused(change):
    other = [{**SAMPLES[n], **change} for n in range(9)]
    assert_refused(check_data(SAMPLES, other, SAMPLES), "train_dataset() on rank 1 (", "sample 0")


class Unstable:
    """Samples that differ each time they are read."""

    reads = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        Unstable.reads += 1
        return torch.tensor([float(Unstable.reads)])


def test_samples_that_never_repeat_are_told_but_not_refused():
    for warnings in check_data(Unstable(), Unstable()):
        assert "is not the same when it is read again" in warnings[0]


class Augmented(Unstable):
    """Samples that draw from the generators which the kit seeds."""

    def __getitem__(self, index):
        return torch.randn(3) + np.random.rand()


def test_seeded_augmentation_is_no_difference():
    assert check_data(Augmented(), Augmented()) == [[], []]


class Broken(Unstable):
    def __getitem__(self, index):
        raise ValueError("broken")


def test_a_sample_that_cannot_be_read_is_left_to_the_run():
    assert check_data(Broken(), Broken()) == [[], []]
    assert check_data([1.0] * 4, Broken()) == [[], []]
