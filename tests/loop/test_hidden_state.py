"""State of modules that no checkpoint holds is found in the first step."""

import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from tests.support.odd import PARTS
from tests.support.tiny import TinyTask
from train.loop.hidden_state import HiddenState


class Holder(nn.Module):
    """Has one attribute."""

    def __init__(self, value):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.inner.kept = value
        self.register_buffer("saved", torch.zeros(1))
        self.inner.register_buffer("private", torch.zeros(1), persistent=False)


def added(holder):
    holder.inner.kept = holder.inner.kept + 1


def called(method, *arguments):
    return lambda holder: getattr(holder.inner.kept, method)(*arguments)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (0, added), (0.5, added), (np.float32(1), added), (torch.zeros(2), added),
        (torch.zeros(2), called("add_", 1)), (np.zeros(2), called("fill", 1.0)),
        ([1], called("append", 2)), (deque([1], 1), called("append", 2)),
        ({"a": torch.zeros(1)}, lambda holder: holder.inner.kept["a"].add_(1)),
        ({"a": {"b": [1]}}, lambda holder: holder.inner.kept["a"]["b"].append(1)),
        (torch.Generator(), lambda holder: torch.rand(1, generator=holder.inner.kept)),
        (np.random.default_rng(0), called("random")), (random.Random(0), called("random")),
        (None, lambda holder: setattr(holder.inner, "kept", 3)),
        ("low", lambda holder: setattr(holder.inner, "kept", "high")),
        (False, lambda holder: setattr(holder.inner, "kept", True)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_changes_is_named(value, change):
    model = Holder(value)
    hidden = HiddenState(model)
    assert hidden.changed() == []
    change(model)
    assert hidden.changed() == ["inner.kept"]


def test_new_attributes_and_buffers_that_are_not_saved_are_named():
    model = Holder(None)
    hidden = HiddenState(model)
    model.late = 1
    model.inner.private = model.inner.private + 1
    assert hidden.changed() == ["late", "inner.private"]


def no_change(model):
    """What a forward pass may do without changing anything that matters."""
    model.eval()
    model.saved = model.saved + 1
    model.inner.private = model.inner.private.clone()
    with torch.no_grad():
        model.inner.weight.add_(1)


@pytest.mark.parametrize(
    "value", [float("nan"), torch.ones(2), nn.Linear(1, 1).weight, len, SimpleNamespace(x=1)]
)
def test_equal_values_parameters_and_other_objects_are_not_named(value):
    model = Holder(value)
    hidden = HiddenState(model)
    no_change(model)
    if isinstance(value, torch.Tensor):
        model.inner.kept = value.detach().clone() if type(value) is torch.Tensor else value
    assert hidden.changed() == []


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x


class Task(TinyTask):
    def build_model(self):
        return nn.Sequential(super().build_model(), Counting())


def test_a_run_names_it_once(tmp_path):
    words = ["task.use=tests.loop.test_hidden_state:Task", "length.steps=6"]
    done = run("fit", tmp_path, *words)
    assert done.stderr.count("The first step changed 1.calls of the model") == 1


@pytest.mark.parametrize(
    "strategy", [*map(slow, ["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"])]
)
def test_what_strategies_change_is_not_named(tmp_path, strategy):
    words = ["task.use=tests.support.odd:OddTask", f"model.parts=[{', '.join(PARTS)}]"]
    words += [f"strategy={strategy}", "length.steps=6"]
    done = run_ranks(1 if strategy == "auto" else 2, "fit", tmp_path, *words)
    assert "The first step changed" not in done[0].stderr
