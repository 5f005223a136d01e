"""Optimisers are judged by what they do with a small example."""

import pytest
import torch
from torch import nn

from tests.support import optimizers
from train.exits import UsageError
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import build_optimizer
from train.optim.probe import KNOWN, Example, check_flat, try_whole

MODEL = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Embedding(5, 2))
MODEL.scale = nn.Parameter(torch.tensor(1.0))
CPU = torch.device("cpu")
OWN = "tests.support.optimizers:"


def tried(use, ranks=2, **options):
    """The updates of the example, and why flat shards get others."""
    config = OptimConfig(use=use, lr=1e-12, weight_decay=0.01, options=options)

    def build(module):
        return build_optimizer(config, module)

    example = Example(MODEL, CPU, ranks)
    whole = try_whole(build, example, use)
    return whole and (whole, check_flat(build, example, whole, ranks))


@pytest.mark.parametrize("use", [*sorted(KNOWN), "adagrad", OWN + "Sign", "torch.optim:Adamax"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_element_by_element_works_in_flat_shards(use, ranks):
    whole, reason = tried(use, ranks)
    assert reason is None
    assert [each.dim() for each in whole.end] == [1, 2, 4]
    assert not any(torch.equal(a, b) for a, b in zip(whole.start, whole.end, strict=True))


@pytest.mark.parametrize(
    ("use", "part"),
    [
        (OWN + "Trust", "in an example its update differs by"),
        ("torch.optim:Adafactor", "has not the shape of the parameter"),
        (OWN + "Rows", "has not the shape of the parameter"),
    ],
)
def test_what_needs_whole_parameters_does_not(use, part):
    reason = tried(use)[1]
    assert reason is not None
    assert part in reason


@pytest.mark.parametrize(
    ("use", "options", "part"),
    [
        ("torch.optim:SparseAdam", {}, "does not support dense gradients"),
        ("torch.optim:ASGD", {"capturable": True}, "capturable=True"),
        ("torch.optim:Adamax", {"differentiable": True}, "a leaf Variable"),
        ("sgd", {"differentiable": True, "fused": False}, "a leaf Variable"),
    ],
)
def test_a_step_of_torch_that_fails_is_the_config_s_fault(use, options, part):
    with pytest.raises(UsageError, match=rf"optim.use is .*whose step fails \(.*{part}"):
        tried(use, **options)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Listing", "state as list ('all')"),
        ("Global", "state of its own ('global')"),
        ("Clock", "state in its attribute clock"),
        ("Grouped", "state in its parameter groups (distance)"),
    ],
)
def test_state_that_no_checkpoint_holds_is_refused(name, part):
    with pytest.raises(UsageError, match="so a checkpoint could not hold it") as caught:
        tried(OWN + name)
    assert part in str(caught.value)


def test_a_closure_is_refused():
    example = Example(MODEL, CPU, 2)
    with pytest.raises(UsageError, match="needs a closure"):
        try_whole(lambda module: torch.optim.LBFGS(module.parameters()), example, "LBFGS")


def test_an_optimiser_that_does_not_take_the_example_is_left_to_the_run():
    assert tried(OWN + "Picky") is None
    assert optimizers.Picky(MODEL.parameters()) is not None
