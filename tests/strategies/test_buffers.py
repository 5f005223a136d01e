"""Buffers are the same on all ranks, and a step that is given up does not change them."""

import torch
from torch import nn

from tests.support.forked import run_ranks
from tests.support.ranks import on_ranks
from tests.support.tiny import TinyTask
from train.strategies.buffers import BufferSync


class Center(nn.Module):
    """Keeps buffers in all ways that models do: reassigned, changed in place, shared, set late."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("assigned", torch.full((2,), value))
        self.register_buffer("in_place", torch.full((3,), value))
        self.register_buffer("count", torch.tensor(int(value)))
        self.register_buffer("late", None)
        self.register_buffer("private", torch.full((2,), value), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("shared", self.in_place)

    def forward(self, step):
        self.assigned = 0.5 * self.assigned + step
        self.in_place += step
        self.count = self.count + 1
        self.late = torch.full((1,), float(step)) if self.late is None else self.late + step
        self.private = self.private + step


def values(module):
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


def test_ranks_have_the_buffers_of_rank_0_at_each_step():
    def train(collectives):
        module = Center(float(collectives.rank + 1))
        buffers, seen = BufferSync(module, collectives), []
        for step in (1, 2, 3):
            buffers.sync()
            seen.append(values(module))
            module(step + 10 * collectives.rank)
        return seen, module.private.tolist()

    (first, private), (second, other) = on_ranks(2, train)
    assert first == second
    assert len({str(seen) for seen in first}) == 3
    assert private != other


def test_a_step_that_is_given_up_changes_no_buffer():
    def give_up(collectives):
        module = Center(1.0)
        buffers = BufferSync(module, collectives)
        module(1)
        buffers.sync()
        before = values(module)
        module(2)
        module(3)
        assert values(module) != before
        buffers.restore()
        assert module.inner.shared is module.in_place
        return values(module) == before

    assert on_ranks(1, give_up) == [True]


def test_a_buffer_that_gets_its_first_value_is_unset_again():
    module = Center(1.0)
    [buffers] = on_ranks(1, lambda collectives: BufferSync(module, collectives))
    buffers.sync()
    module(1)
    assert module.late is not None
    buffers.restore()
    assert module.late is None


class OfAnyDtype(nn.Identity):
    def __init__(self):
        super().__init__()
        for dtype in (torch.uint16, torch.float8_e5m2, torch.complex64, torch.bool):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(name, torch.ones(3, dtype=dtype))


class Task(TinyTask):
    def build_model(self):
        return nn.Sequential(super().build_model(), OfAnyDtype())


def test_buffers_of_dtypes_that_gloo_does_not_know_are_exchanged(tmp_path):
    words = [f"task.use={__name__}:Task", "strategy=ddp", "length.steps=6"]
    run_ranks(2, "fit", tmp_path, *words)
