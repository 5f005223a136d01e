"""A new model gets buffers of the shapes and dtypes that were stored."""

import pytest
import torch
from torch import nn

from train.checkpoint.buffers import adopt_buffers


@pytest.mark.parametrize(
    ("new", "stored", "expected"),
    [
        (torch.zeros(1), ((4,), torch.float32), torch.float32),
        (torch.zeros(4), ((4,), torch.float64), torch.float64),
        (torch.zeros(4, dtype=torch.int64), ((4,), torch.bfloat16), torch.bfloat16),
        (torch.zeros(4), ((2, 2), torch.bfloat16), torch.float32),
        (None, ((), torch.bool), torch.bool),
    ],
)
def test_buffers_get_the_stored_form(new, stored, expected):
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_buffer("kept", new)
    shape, dtype = torch.Size(stored[0]), stored[1]
    adopt_buffers(model, {"model.0.kept": (shape, dtype)}, prefix="model.")
    assert model[0].kept.shape == shape
    assert model[0].kept.dtype == expected


def test_nothing_else_of_the_model_changes():
    """Names of a stranger's checkpoint create nothing."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[1].register_buffer("private", torch.zeros(1), persistent=False)
    before = dict([*model.named_parameters(), *model.named_buffers()])
    other = (torch.Size([7]), torch.float32)
    names = ["0.weight", "1.private", "1.new", "2.x", "0.running_mean.x", "forward"]
    adopt_buffers(model, dict.fromkeys(names, other))
    adopt_buffers(model, {"0.running_mean": (torch.Size([3]), torch.float32)})
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
