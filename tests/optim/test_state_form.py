"""A stored optimiser state is used only by an optimiser that keeps the same entries."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from train.optim.optim_config import NAMES, OptimConfig
from train.optim.optimizer import build_optimizer
from train.optim.state_form import state_that_fits


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def stepped(config):
    """A model and its optimiser after a step."""
    model = make()
    optimizer = build_optimizer(config, model)
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def stored(config):
    """The state as a checkpoint describes it, and the shapes of the parameters."""
    model, optimizer = stepped(config)
    entries = {
        name: {
            key: (value.shape, value.dtype) if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for name, parameter in model.named_parameters()
    }
    return entries, {name: parameter.shape for name, parameter in model.named_parameters()}


ALIKE = {"adam", "adamw", "radam"}


@pytest.mark.parametrize(("before", "now"), list(product(NAMES, NAMES)))
def test_state_is_kept_where_its_entries_are_the_same(before, now):
    saved, shapes = stored(OptimConfig(use=before))
    fits = state_that_fits(OptimConfig(use=now), saved, shapes)
    if before == "sgd" or now == "sgd":  # without momentum, SGD has no state
        assert fits is None
    elif before == now or {before, now} <= ALIKE:
        assert fits == saved
    elif before == "nadam" and now in ALIKE:  # all but the entry that only NAdam has
        kept = ("step", "exp_avg", "exp_avg_sq")
        assert fits == {name: {k: e[k] for k in kept} for name, e in saved.items()}
    else:
        assert fits is None


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ({"use": "sgd", "momentum": 0.9}, {"use": "sgd"}, False),
        ({"use": "sgd", "momentum": 0.9}, {"use": "sgd", "momentum": 0.5}, True),
        ({"use": "adamw"}, {"use": "adamw", "options": {"amsgrad": True}}, False),
        ({"use": "adamw"}, {"use": "sgd", "momentum": 0.9}, False),
        ({"use": "rmsprop"}, {"use": "rmsprop", "options": {"centered": True}}, False),
        ({"use": "adamw"}, {"use": "adamw", "betas": [0.5, 0.6]}, True),
    ],
)
def test_options_that_change_the_entries(before, now, kept):
    saved, shapes = stored(OptimConfig(**before))
    fits = state_that_fits(OptimConfig(**now), saved, shapes)
    assert fits == (saved if kept else None)


def test_entries_that_are_not_needed_any_more_are_left_out():
    saved, shapes = stored(OptimConfig(options={"amsgrad": True}))
    fits = state_that_fits(OptimConfig(), saved, shapes)
    assert {key for entries in fits.values() for key in entries} == {
        "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


class PerRow(torch.optim.Optimizer):
    """Keeps a number per row, under the name of a state of Adam."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": parameter.grad.reshape(len(parameter), -1)[:, 0]
                }


def test_an_entry_of_another_shape_is_not_the_same():
    own = OptimConfig(use="tests.optim.test_state_form:PerRow")
    saved, shapes = stored(OptimConfig())
    assert state_that_fits(own, saved, shapes) is None
    saved, shapes = stored(own)
    assert state_that_fits(own, saved, shapes) == saved


class Demanding(PerRow):
    """Takes a step only for parameters of at least three rows."""

    def step(self):
        if any(len(p) < 3 for group in self.param_groups for p in group["params"]):
            raise RuntimeError("too small")
        super().step()


def test_state_is_kept_where_the_step_cannot_be_tried():
    saved = {"weight": {"exp_avg": (torch.Size([4]), torch.float32)}}
    own = OptimConfig(use="tests.optim.test_state_form:Demanding")
    assert state_that_fits(own, saved, {"weight": torch.Size([4, 4])}) == saved
