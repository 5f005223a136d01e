"""What a forward pass may not do to a model, and what it does that a user must know."""

import pytest
import torch
from torch import nn

from tests.support.ranks import on_ranks
from train.exits import UsageError
from train.loop.forward_effects import (
    BufferChanges,
    ModeChanges,
    ParameterChanges,
    RegisteredParts,
)
from train.strategies.parameters import check_memory


def no_effect(model):
    model.norm.weight.grad = torch.ones(2)
    model.seen = model.seen.clone()


def averages(model):
    with torch.no_grad():
        model.kept.lerp_(torch.ones(2), 0.5)


def clips(model):
    model.norm.weight.data.clamp_(max=0.5)


def assigns(model):
    model.norm.weight.data = torch.zeros(2)


def replaces(model):
    model.norm.weight = nn.Parameter(torch.ones(2))


def codes(model):
    model.codes.data.add_(0)
    model.codes.add_(1)


class Model(nn.Module):
    """Does something else in each forward pass."""

    def __init__(self, effect):
        super().__init__()
        self.effect, self.norm = effect, nn.BatchNorm1d(2)
        self.kept = nn.Parameter(torch.zeros(2), False)
        self.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, x):
        self.effect(self)
        return self.norm(x)


def check(collectives, effect):
    model = Model(effect)
    changes = ParameterChanges(model)
    with changes.watching([model, model.norm]):
        model(torch.randn(4, 2))
    assert not model._forward_hooks
    changes.check(collectives)


def test_a_forward_pass_may_compute():
    assert on_ranks(1, lambda collectives: check(collectives, no_effect)) == [None]


@pytest.mark.parametrize(
    ("effect", "name"),
    [
        (averages, "kept"), (clips, "norm.weight"), (assigns, "norm.weight"),
        (replaces, "norm.weight"), (codes, "codes"),
    ],
)  # fmt: skip
def test_a_parameter_that_changes_is_named_on_all_ranks(effect, name):
    def on_rank(collectives):
        check(collectives, effect if collectives.rank else no_effect)

    for error in on_ranks(2, on_rank):
        assert isinstance(error, UsageError)
        assert f"changed the values of the parameters {name}, which" in str(error)


def evaluates(model):
    model.norm.eval()


def trains(model):
    model.train()


def restores(model):
    model.eval()
    model.train()
    model.frozen.eval()


@pytest.mark.parametrize(
    ("effect", "said"),
    [
        (evaluates, "left norm in evaluation mode"),
        (trains, "left frozen in training mode"),
        (restores, None),
    ],
)
def test_a_mode_that_a_forward_pass_switches_is_refused_on_all_ranks(effect, said):
    def on_rank(collectives):
        model = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "frozen": nn.Dropout().eval()})
        modes = ModeChanges(model)
        with modes.watching():
            if collectives.rank:
                effect(model)
        modes.check(collectives)

    for error in on_ranks(2, on_rank):
        assert said in str(error) if said else error is None


def adds_buffer(model):
    model.register_buffer("more", torch.zeros(1))


def adds_layer(model):
    model.proj = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("effect", "reason"),
    [
        (adds_buffer, "first step registered the buffer more"),
        (adds_layer, "first step registered the parameter proj.weight"),
    ],
)
def test_a_part_that_is_registered_late_is_refused(effect, reason):
    model = Model(effect)
    parts = RegisteredParts(model)
    model(torch.randn(4, 2))
    with pytest.raises(UsageError, match=reason):
        parts.check("first step")


def counts(model):
    model.seen += 1


def sets(model):
    model.late = torch.zeros(1)


@pytest.mark.parametrize(
    ("effect", "names"), [(no_effect, []), (counts, ["seen"]), (sets, ["late"])]
)
def test_buffers_that_change_are_named_except_those_of_known_layers(effect, names):
    model = Model(effect)
    changes = BufferChanges(model)
    for _ in range(2):
        with changes.watching():
            model(torch.randn(4, 2))
    assert changes.names == names


def parameters(*tensors, buffer=None):
    model = nn.Module()
    for number, tensor in enumerate(tensors):
        model.register_parameter(f"p{number}", nn.Parameter(tensor))
    model.register_buffer("buffer", buffer)
    return model


MEMORY = torch.arange(24.0)


def test_parts_of_one_memory_are_allowed():
    wide = MEMORY.view(4, 6)
    check_memory(parameters(MEMORY[:12], MEMORY[12:]))
    check_memory(parameters(wide[:, :3], wide[:, 3:], torch.zeros(0)))
    check_memory(parameters(MEMORY.view(4, 6).t()))
    with torch.device("meta"):
        check_memory(parameters(torch.zeros(2), torch.zeros(2)))
    model = parameters(MEMORY, buffer=MEMORY)
    check_memory(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (parameters(MEMORY[:13], MEMORY[12:]), "p0 shares memory with p1"),
        (parameters(MEMORY.view(4, 6)[:, :4], MEMORY.view(4, 6)[:, 3:]), "p0 shares memory with p1"),
        (parameters(MEMORY.view(4, 6), MEMORY.view(4, 6).t()), "p0 shares memory with p1"),
        (parameters(MEMORY, buffer=MEMORY[3:5]), "p0 shares memory with buffer"),
        (parameters(MEMORY[:1].expand(5)), "elements of the parameter p0 share memory"),
    ],
)  # fmt: skip
def test_memory_that_is_used_twice_is_refused(model, reason):
    with pytest.raises(UsageError, match=reason):
        check_memory(model)
