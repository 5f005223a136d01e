"""Parts of a model whose results depend on how steps are divided are named at the start."""

import pytest
from torch import nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from train.data.plan import BatchConfig, BatchPlan
from train.setup.micro_batch_effects import dropout_note, micro_batch_warnings

PLAN = BatchPlan.from_config(BatchConfig(global_batch_size=12, micro_batch_size=3), 1)


def warnings(part, last=None):
    return micro_batch_warnings(last or {}, PLAN, nn.Sequential(nn.Linear(2, 2), part))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (nn.BatchNorm2d(2), "1 (BatchNorm2d)"),
        (nn.BatchNorm1d(2, track_running_stats=False), "1 (BatchNorm1d)"),
        (nn.SyncBatchNorm(2), "1 (SyncBatchNorm)"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "1 (InstanceNorm2d)"),
        (spectral_norm(nn.Linear(2, 2)), "1 (spectral norm)"),
        (hooked_spectral_norm(nn.Linear(2, 2)), "1 (spectral norm)"),
    ],
)
def test_what_depends_on_the_micro_batch_is_named(part, name):
    [warning] = warnings(part)
    assert f"because of {name}, which uses whole micro-batches" in warning
    part.eval()
    assert warnings(part) == []


@pytest.mark.parametrize(
    "part", [nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2), nn.Dropout(0.5)]
)
def test_what_does_not_is_not(part):
    assert warnings(part) == []


def test_another_micro_batch_than_before_is_named():
    last = {"micro_batch_size": 4}
    assert "have 3 samples now and had 4 before, so dropout" in warnings(nn.Dropout(0.1), last)[0]
    assert "have 3 samples now and had 4 before" in warnings(nn.BatchNorm1d(2), last)[0]
    assert warnings(nn.Linear(2, 2), last) == []
    assert warnings(nn.Dropout(0.1), {"micro_batch_size": 3}) == []


@pytest.mark.parametrize(
    "part",
    [nn.Dropout(0.1), nn.MultiheadAttention(2, 1, dropout=0.1), nn.GRU(2, 2, 2, dropout=0.1)],
)
def test_dropout_with_a_size_that_the_placement_chooses_is_named(part):
    assert "chooses, here 3 samples" in dropout_note(PLAN, nn.Sequential(part))
    assert warnings(part, {"micro_batch_size": 4}) != []
    part.eval()
    assert dropout_note(PLAN, part) == ""
    assert micro_batch_warnings({"micro_batch_size": 4}, PLAN, part) == []


def test_a_size_that_the_placement_chooses_does_not_matter_without_dropout():
    for part in (nn.Linear(2, 2), nn.Dropout(0.0), nn.MultiheadAttention(2, 1)):
        assert dropout_note(PLAN, part) == ""
