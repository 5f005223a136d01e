"""Whether the training data is still that of a checkpoint."""

import json
import math

import numpy as np
import pytest
import torch

from train.data.loader_config import LoaderConfig
from train.setup.fingerprint import DataFingerprint


def fingerprint(dataset, seed=5, workers=0):
    return DataFingerprint(dataset, seed, LoaderConfig(workers=workers))


def stored(dataset):
    """As a checkpoint has it."""
    return json.loads(json.dumps(fingerprint(dataset).to_json(), allow_nan=False))


SAMPLES = [
    lambda: {"x": torch.linspace(0, 1, 12).view(3, 4), "id": 7, "text": "a"},
    lambda: (np.arange(5), np.array([math.nan, math.inf, 1.0])),
    lambda: [1.5, True, b"bytes", None, torch.zeros(0), torch.tensor([1 + 2j])],
    lambda: {"nested": [{"deep": (torch.ones(2).bfloat16(),)}]},
    lambda: torch.randn(3) + np.random.rand(),
]


class Drawn:
    def __init__(self, make, size=9):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make()


@pytest.mark.parametrize("make", SAMPLES)
def test_the_same_data_has_no_difference(make):
    assert stored(Drawn(make)), "nothing is compared"
    assert fingerprint(Drawn(make)).difference(stored(Drawn(make))) is None


@pytest.mark.process
def test_a_worker_reads_the_same():
    for make in SAMPLES:
        assert fingerprint(Drawn(make), workers=2).difference(stored(Drawn(make))) is None


CHANGES = {
    "sample 0['x']": {"x": torch.full((4,), 1.1), "id": 1, "text": "b"},
    "sample 0['id']": {"x": torch.ones(4), "id": 2, "text": "b"},
    "sample 0['y']": {"x": torch.ones(4), "id": 1, "y": 2.0},
    "sample 0['lens']": {"x": torch.ones(4), "id": 1, "lens": [1, 2, 4]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_value_is_named(name):
    last = {"lens": [1, 2, 3]} if "lens" in name else {"z": 2.0}
    before = stored([{"x": torch.ones(4), "id": 1, **last}])
    assert fingerprint([CHANGES[name]]).difference(before) == name


def test_dtype_shape_and_a_value_that_becomes_nan_are_differences():
    before = stored([torch.ones(4)])
    for other in (torch.ones(4).double(), torch.ones(2, 2), torch.full((4,), math.nan)):
        assert fingerprint([other]).difference(before) == "sample 0"


def test_rounding_is_no_difference():
    assert fingerprint([torch.ones(4) + 1e-4]).difference(stored([torch.ones(4)])) is None


def test_the_last_sample_counts():
    before = stored([float(n) for n in range(50)])
    assert fingerprint([*map(float, range(49)), 7.0]).difference(before) == "sample 49"


@pytest.mark.parametrize("wrong", [None, 3, "text", [1], [["a", "b", ["c"]]], [["a", "b", 3]], {}])
def test_what_another_version_stored_is_not_compared(wrong):
    assert fingerprint([1.0]).difference(wrong) is None


def test_text_may_hold_paths_of_one_machine_and_is_not_stored():
    before = stored([{"file": "/one/a.png", "x": 1.0}])
    assert fingerprint([{"file": "/other/a.png", "x": 1.0}]).difference(before) is None
    assert "/one" not in json.dumps(before)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0)[::-1],
        np.arange(12.0).reshape(3, 4).T,
        np.arange(6, dtype=">f4"),
        np.arange(6, dtype=">i8"),
        np.arange(3, dtype=np.longdouble),
        np.array(["a", "b"]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.array([{}, None], dtype=object),
        np.datetime64("2026-01-01"),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        [10**400, 1],
        "\ud800",
    ],
    ids=range(15),
)
def test_any_value_may_be_in_a_sample(array):
    assert fingerprint([array]).difference(stored([array])) is None


def test_samples_of_generators_that_start_alike_are_not_stable():
    class Own:
        """Draws from a generator of its own, which forked workers have in the same state."""

        def __init__(self):
            self.random = np.random.default_rng(0)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return self.random.random()

    assert not fingerprint(Own()).is_stable()
    assert fingerprint(Drawn(SAMPLES[4])).is_stable()


def test_large_samples_are_stored_in_part():
    sizes = len(stored([{str(n): n for n in range(500)}] * 3)), len(stored([list(range(500))] * 3))
    assert sizes == (63, 3)
    same = [{str(n): n for n in range(500)}]
    assert fingerprint(same).difference(stored(same)) is None
