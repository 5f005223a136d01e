"""torchmetrics objects give the values of one process on any number of ranks."""

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from tests.support.ranks import on_ranks
from tests.support.strategies import engine
from tests.support.tiny import TinyTask
from train.data.loader import evaluation_batches
from train.data.loader_config import LoaderConfig
from train.data.plan import EvalPlan
from train.exits import UsageError
from train.loop.evaluate import evaluate
from train.tasks.base import Ratio

CLASSES = 3  # as in tests/loop/metric_objects.py


class Rows:
    """Samples of several classes; the first ones are all of class 0."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.scores = torch.rand(size, CLASSES, generator=generator)

    def __len__(self):
        return len(self.scores)

    def __getitem__(self, index):
        label = 0 if index < 3 else index % CLASSES
        return {"index": index, "scores": self.scores[index], "label": label}


class Measured(TinyTask):
    """Passes scores and labels to an object, or what ``arguments`` makes of a batch."""

    def __init__(self, make, arguments=None):
        self.make, self.arguments = make, arguments or (lambda b: (b["scores"], b["label"]))

    def metrics(self):
        return {"m": self.make()}

    def measure(self, model, batch):
        found = self.arguments(batch)
        return {} if found is None else {"m": found}


def measured(task, *, ranks=1, size=10, micro=1):
    """The metrics on each rank."""
    # Here, since imports of old versions warn, and in one thread.
    importlib.import_module("tests.loop.metric_objects")

    def on_rank(collectives):
        batches = evaluation_batches(
            Rows(size), EvalPlan(size, micro, collectives.world_size), collectives.rank, seed=1,
            collate=default_collate, config=LoaderConfig(), device_type="cpu",
        )  # fmt: skip
        own = engine()
        own.collectives = collectives
        with batches, warnings.catch_warnings():
            warnings.simplefilter("error")
            model = torch.nn.Linear(1, 1)
            return evaluate(own, lambda function: function(model), model, task(), batches)

    return on_ranks(ranks, on_rank)


pytestmark = pytest.mark.normal  # the import of torchmetrics takes seconds

KINDS = (
    "sums",
    "one number per class",
    "a matrix",
    "lists that are joined",
    "lists that are not",
    "lists of scalars",
    "moments",
    "a collection",
    "nested collections",
    "a wrapper",
    "some batches only",
    "some batches, a collection",
)


def kept(kind):
    """The arguments of ``Measured`` for a kind of object."""
    from tests.loop.metric_objects import OBJECTS

    assert tuple(OBJECTS) == KINDS
    return OBJECTS[kind]


def of_rank(*words):
    """A metric that returns whatever it is made with."""
    from tests.loop.metric_objects import OfRank

    return OfRank(*words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (3, 1), (2, 4)])
def test_any_number_of_ranks_gives_the_values_of_one(kind, ranks, micro):
    [alone] = measured(lambda: Measured(*kept(kind)), micro=10)
    found = measured(lambda: Measured(*kept(kind)), ranks=ranks, micro=micro)
    assert found == [pytest.approx(alone, rel=1e-5)] * ranks
    assert all(math.isfinite(value) for value in alone.values())


@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_a_task_keeps_can_be_used_again(kind):
    make, arguments = kept(kind)

    class Keeps(Measured):
        def __init__(self):
            super().__init__(make, arguments)
            self.objects = super().metrics()

        def metrics(self):
            return self.objects

    def measured_again():
        ranks = iter(tasks)
        return measured(lambda: next(ranks), ranks=2)

    tasks = Keeps(), Keeps()
    assert measured_again() == measured_again()


def test_values_with_several_numbers_have_names_of_their_own():
    def names(kind):
        return list(measured(lambda: Measured(*kept(kind)))[0])

    assert names("sums") == ["m"]
    assert names("one number per class") == ["m/0", "m/1", "m/2"]
    assert names("a matrix") == [f"m/{row}/{column}" for row in range(3) for column in range(3)]
    assert names("a collection") == ["m/MulticlassPrecision", "m/MulticlassRecall"]
    assert names("a wrapper") == [f"m/multiclassaccuracy_{number}" for number in range(3)]


@pytest.mark.parametrize("kind", ["sums", "lists that are not", "lists of scalars"])
def test_a_rank_without_samples_adds_nothing(kind):
    [alone] = measured(lambda: Measured(*kept(kind)), size=3)
    found = measured(lambda: Measured(*kept(kind)), size=3, ranks=4)
    assert found == [pytest.approx(alone)] * 4


def test_an_object_without_updates_is_nan():
    def task():
        return Measured(*kept("lists that are joined")[:1], lambda batch: None)

    for metrics in measured(task, ranks=2):
        assert math.isnan(metrics["m"])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.float32(1.5), {"m": 1.5}),
        (np.array([True, False]), {"m/0": 1.0, "m/1": 0.0}),
        (torch.tensor([[2]]), {"m": 2.0}),
        ((1, [2, 3]), {"m/0": 1.0, "m/1/0": 2.0, "m/1/1": 3.0}),
        ({"α/β": {1: torch.tensor(4, dtype=torch.int8)}}, {"m/α/β/1": 4.0}),
        (torch.empty(0), {}),
    ],
)  # fmt: skip
def test_any_form_of_numbers_is_a_value(value, found):
    assert measured(lambda: Measured(lambda: of_rank(value))) == [found]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("good", "returned str for 'm'; return a number"),
        ({"x": None}, "returned NoneType for 'm/x'"),
        (torch.zeros(40, 40), "'m' of the task's metrics.. has 1,600 values"),
        (torch.tensor(1j), "for 'm'; return a number"),
    ],
)
def test_a_value_that_is_not_made_of_numbers_is_refused_on_every_rank(value, said):
    for error in measured(lambda: Measured(lambda: of_rank(value)), ranks=2):
        with pytest.raises(UsageError, match=said):
            raise error


def test_a_state_that_ranks_would_average_is_refused():
    for error in measured(lambda: Measured(lambda: of_rank(1.0, "mean")), ranks=2):
        with pytest.raises(UsageError, match="'total' of the metric 'm' .OfRank. is averaged"):
            raise error


def test_an_object_that_cannot_be_merged_is_refused_on_one_process_too():
    class Own:
        def update(self, scores, label):
            pass

        def compute(self):
            return 1.0

    for made in (Own(), type(of_rank(1.0)), None):
        [error] = measured(lambda made=made: Measured(lambda: made))
        assert isinstance(error, UsageError)
        assert "for 'm'; return a torchmetrics object" in str(error)


class Named(TinyTask):
    """Returns ``of(index)`` for each sample."""

    def __init__(self, of, derived=()):
        self.of, self.derived = of, dict(derived)

    def measure(self, model, batch):
        return self.of(int(batch["index"][0]))

    def derive(self, totals):
        return self.derived


@pytest.mark.parametrize(
    "one",
    [
        True, 1, 1.0, np.bool_(True), np.int8(1), np.float64(1), np.array(1.0),
        torch.tensor(True), torch.tensor([[1]], dtype=torch.uint8),
        torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0, requires_grad=True),
    ],
    ids=repr,
)  # fmt: skip
def test_sums_and_counts_may_be_numbers_of_any_kind(one):
    assert (
        measured(lambda: Named(lambda index: {"x": Ratio(one, one)}), ranks=2) == [{"x": 1.0}] * 2
    )


def test_nothing_finite_on_one_rank_is_so_on_all():
    def of(index):
        return {"nan": Ratio(float("nan") if index == 1 else 1, 1), f"own {index}": Ratio(index, 1)}

    found = measured(lambda: Named(of), ranks=2, size=2)
    assert found == [pytest.approx({"nan": math.nan, "own 0": 0, "own 1": 1}, nan_ok=True)] * 2


def test_ranks_without_any_name_have_those_of_the_others():
    found = measured(lambda: Named(lambda i: {"x": Ratio(i, 1)} if i == 1 else {}), ranks=2, size=2)
    assert found == [{"x": 1.0}] * 2
    assert measured(lambda: Named(lambda index: {}), ranks=2) == [{}, {}]


def test_padding_of_the_last_round_adds_no_name():
    """Three ranks, four samples: two ranks repeat sample 0 in the last round."""
    found = measured(lambda: Named(lambda index: {f"sample {index}": Ratio(1, 1)}), ranks=3, size=4)
    assert all(sorted(names) == [f"sample {index}" for index in range(4)] for names in found)


def test_ranks_get_the_metrics_of_rank_0():
    """Or one would stop early while another goes on."""
    ranks = iter(range(10))

    class Odd(Named):
        def derive(self, totals):
            return {"odd": next(ranks)}

    first, second = measured(lambda: Odd(lambda index: {"x": Ratio(1, 1)}), ranks=2)
    assert first == second


@pytest.mark.parametrize(
    ("names", "derived", "said"),
    [
        ({3: Ratio(1, 1)}, {}, r"measure\(\) returned the name 3, which is not text"),
        ({"": Ratio(1, 1)}, {}, "the name '', which is not text"),
        ({"checkpoint": Ratio(1, 1)}, {}, "named 'checkpoint', a key that `evaluate --json`"),
        (
            {"x": Ratio(1, 1)},
            {"checkpoint": 1.0},
            r"derive\(\) returned a metric named 'checkpoint'",
        ),
        ({"x": Ratio(1, 1)}, {"x": 2.0}, "two metrics named 'x'"),
        ({"x": Ratio(torch.tensor(1j), 1)}, {}, "in the Ratio for 'x'"),
        ({"x": Ratio("1", 1)}, {}, "in the Ratio for 'x'"),
        ({"x": Ratio(np.ones(2), 1)}, {}, "in the Ratio for 'x'"),
    ],
)
def test_wrong_names_and_parts_are_refused(names, derived, said):
    for error in measured(lambda: Named(lambda index: names, derived), ranks=2):
        with pytest.raises(UsageError, match=said):
            raise error
