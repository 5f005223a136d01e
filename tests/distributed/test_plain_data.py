"""What ranks exchange is plain data, or a pickle with a signature."""

import math
import pickle
import random
from enum import Enum, IntEnum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.distributed.collectives import Collectives
from train.distributed.plain_data import decode, encode
from train.exits import RetryError
from train.signing import MessageError, Signer

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
PLAIN = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def typed(value):
    """With the types of all parts, since 1 == True == 1.0."""
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    if isinstance(value, dict):
        return dict, [(typed(key), typed(item)) for key, item in value.items()]
    return type(value), value


@settings(max_examples=50)
@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value):
    assert typed(decode(encode(value))) == typed(value)


def test_values_of_subclasses_come_back_as_plain_ones():
    class Color(IntEnum):
        RED = 1

    class Version(str):
        def __str__(self):
            return "other"

    found = decode(encode([Color.RED, np.float64(0.5), np.int64(3), Version("2.13")]))
    assert typed(found) == typed([1, 0.5, 3, "2.13"])
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode(-math.inf)) == -math.inf


@pytest.mark.parametrize(
    "value", [torch.ones(1), {1}, b"bytes", object(), Enum("E", "a").a, [{"key": ValueError("x")}]]
)
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="is not plain data"):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b'{"object":1}', b'{"tuple":1}', b'{"dict":[1]}', b'{"dict":[[[],1]]}',
     b'{"dict":[["a"]]}', b"[" * 100_000, b"9" * 10_000, pickle.dumps({"a": 1})],
)  # fmt: skip
def test_data_of_another_program_is_one_error(data):
    with pytest.raises(RetryError, match="wrong format"):
        decode(data)


def test_mutations_are_decoded_or_refused():
    good = encode({"a": [1, (2.5, "text")], ("b", 1): None})
    for seed in range(500):
        rng = random.Random(seed)
        at = rng.randrange(len(good))
        bad = good[:at] + rng.randbytes(rng.randrange(3)) + good[at + rng.randrange(3) :]
        try:
            value = decode(bad)
        except RetryError:
            continue
        assert typed(decode(encode(value))) == typed(value) or "nan" in repr(value)


class Tampered(Collectives):
    """Another process changes what the ranks exchange."""

    def __init__(self, change, signer):
        super().__init__(1, 2, signer=signer)
        self._change, self._own = change, Collectives(0, 2, signer=signer)

    def _broadcast_bytes(self, own):
        return self._change(self._own._signed_pickle({"a": 1}))

    def _all_gather_bytes(self, own):
        return [self._broadcast_bytes(own), own]


class Evil:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


SIGNER = Signer(b"secret of the run", "run")
EVIL = pickle.dumps(Evil())


@pytest.mark.parametrize(
    "change",
    [lambda _: EVIL, lambda _: b"-:" + EVIL, lambda data: data[:65] + EVIL,
     lambda _: Signer(b"other", "run").sign("pickle/0", EVIL),
     lambda _: SIGNER.sign("pickle/1", EVIL)],
)  # fmt: skip
def test_a_pickle_without_the_signature_is_not_read(change):
    ranks = Tampered(change, SIGNER)
    for exchange in (ranks.broadcast_pickled, ranks.all_gather_pickled):
        with pytest.raises(MessageError):
            exchange(None)


def test_a_pickle_with_the_signature_is():
    ranks = Tampered(lambda data: data, SIGNER)
    assert ranks.broadcast_pickled(None) == {"a": 1}
    assert ranks.all_gather_pickled({2}) == [{"a": 1}, {2}]
