"""What modules return from ``get_extra_state``: data survives unchanged, all else is refused."""

import io
import json
from collections import Counter, OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.ranks import on_ranks
from train.checkpoint.extra_state import (
    ExtraState,
    check_extra_state,
    get_extra_state,
    set_extra_state,
)
from train.checkpoint.state import restore_extra_state
from train.exits import ResumeRefusedError, UsageError
from train.strategies.buffers import BufferSync


class Keeps(nn.Module):
    """Keeps a value that is neither a parameter nor a buffer."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def moved(value):
    """The value after it was stored as JSON and tensors, and passed to another module."""
    state = get_extra_state(nn.Sequential(nn.Linear(1, 1), Keeps(value)))
    assert state.values.keys() == {"1._extra_state"}
    stored = ExtraState(json.loads(json.dumps(state.values, allow_nan=False)), state.tensors)
    other = nn.Sequential(nn.Linear(1, 1), Keeps(None))
    set_extra_state(other, stored)
    return other[1].value


VALUES = [
    None, True, 7, 10**40, -0.0, 1e-320, float("inf"), float("nan"), "", "é\n\ud800", b"\0\xff",
    bytearray(b"ab"), [], (), {}, [1, (2.5, [None])], OrderedDict(b=1, a=[2]),
    {1: "a", "1": "b", None: 2, (1, "x"): 3, 2.5: True}, {"list": [1], "tensor": "t"},
    torch.tensor(3), torch.tensor([]), torch.zeros(0, 3), torch.tensor([float("nan"), 1.0]),
    torch.linspace(0, 1, 6).view(2, 3).bfloat16().t(), torch.tensor(1j), torch.tensor([True, False]),
    {"history": [torch.ones(2), {"deep": torch.arange(3)}]},
    np.float32(1.5), np.int64(-3), np.array([[1, 2]], dtype=np.int16), np.array(True), np.zeros(0),
]  # fmt: skip


def equal(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor | np.ndarray | np.generic):
        return one.dtype == other.dtype and np.array_equal(
            *(torch.as_tensor(v).resolve_conj().to(torch.complex128).numpy() for v in (one, other)),
            equal_nan=True,
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return equal(list(one.items()), list(other.items()))
    return one == other or (one != one and other != other)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_data_comes_back_as_it_was(value):
    assert equal(moved(value), value)
    check_extra_state(Keeps(value))


def looped():
    inner = []
    inner.append(inner)
    return inner


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (io.BytesIO(b"x"), "contains a _io.BytesIO"),
        ([{"f": len}], "contains a builtins.builtin_function_or_method"),
        (Counter("aab"), "contains a collections.Counter"),
        (Point(1, 2), "contains a tests.checkpoint.test_extra_state.Point"),
        ({1, 2}, "contains a builtins.set"),
        (nn.Linear(1, 1), "contains a torch.nn.modules.linear.Linear"),
        (np.array([object()]), "a numpy array of dtype object"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "the meta device"),
        (looped(), "nested too deep"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_objects_are_refused_before_anything_is_stored(value, said):
    model = nn.Sequential(nn.Identity(), Keeps(value))
    with pytest.raises(UsageError, match=said) as found:
        check_extra_state(model)
    assert "get_extra_state() of the Keeps '1' returned" in str(found.value)


class OnlyGets(nn.Module):
    def get_extra_state(self):
        return 1


class Forgets(Keeps):
    def set_extra_state(self, state):
        self.value = 0


class Raises(Keeps):
    def set_extra_state(self, state):
        raise KeyError("scale")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (OnlyGets(), "OnlyGets 'inner' has get_extra_state.. but no set_extra_state"),
        (Forgets(1), "does not restore what get_extra_state.. returned, for the module 'inner'"),
        (Forgets(torch.ones(1)), "does not restore"),
        (Raises(1), "set_extra_state.. of the Raises 'inner' failed .*KeyError"),
    ],
)
def test_state_that_would_be_lost_is_refused(module, said):
    with pytest.raises(UsageError, match=said):
        check_extra_state(nn.ModuleDict({"inner": module}))


class Counts(Keeps):
    """Counts its forward passes, and keeps the last input."""

    def __init__(self, rank=0):
        super().__init__({"calls": 0, "last": torch.full((2,), float(rank))})

    def forward(self, x):
        self.value["calls"] += 1
        self.value["last"] += x


def shown(module):
    return module.value["calls"], module.value["last"].tolist()


def test_ranks_have_the_extra_state_of_rank_0():
    def train(collectives):
        module = Counts(collectives.rank)
        buffers, seen = BufferSync(module, collectives), []
        for _ in range(3):
            buffers.sync()
            seen.append(shown(module))
            module(1.0 + collectives.rank)
        return seen

    first, second = on_ranks(2, train)
    assert first == second == [(0, [0, 0]), (1, [1, 1]), (2, [2, 2])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_given_up_does_not_change_it(ranks):
    def give_up(collectives):
        module = Counts()
        buffers = BufferSync(module, collectives)
        module(1.0)
        buffers.sync()
        before = shown(module)
        module(2.0)
        module(3.0)
        buffers.restore()
        return shown(module) == before

    assert on_ranks(ranks, give_up) == [True] * ranks


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(ResumeRefusedError, match="1._extra_state is only in the model"):
        restore_extra_state(tmp_path, {}, nn.Sequential(nn.Identity(), Keeps(1)))
    with pytest.raises(ResumeRefusedError, match="0._extra_state is only in the checkpoint"):
        restore_extra_state(tmp_path, {"0._extra_state": 1}, nn.Sequential(nn.Identity()))


def test_a_checkpoint_of_an_earlier_version_starts_it_anew(tmp_path, caplog):
    model = nn.Sequential(Keeps(1))
    restore_extra_state(tmp_path, None, model)
    assert model[0].value == 1
    assert "the extra state of 0._extra_state starts anew" in caplog.text
