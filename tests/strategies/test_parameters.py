"""Models that no strategy can train are refused before a strategy takes them."""

import pytest
import torch
from torch import nn

from train.exits import UsageError
from train.strategies.parameters import check_modules


def with_meta():
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(2, device="meta"))
    return model


def with_empty_parameter():
    model = nn.Linear(2, 2).requires_grad_(False)
    model.prompt = nn.Parameter(torch.ones(0))
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "0 is a TorchScript module"),
        (with_meta, "table is on the meta device"),
        (nn.Identity, "no trainable parameter"),
        (with_empty_parameter, "no trainable parameter"),
    ],
)
def test_a_model_that_no_strategy_can_train(build, reason):
    with pytest.raises(UsageError, match=reason):
        check_modules(build(), allocated=True)


def test_a_model_that_is_to_be_allocated():
    check_modules(with_meta(), allocated=False)
