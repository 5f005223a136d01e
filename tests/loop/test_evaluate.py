"""Metrics over a dataset equal those of one large batch, with any micro-batch size."""

import pytest
import torch

from tests.support.forked import quick_run as run
from tests.support.ranks import on_ranks
from tests.support.strategies import engine
from tests.support.tiny import TinyTask
from train.data.loader import evaluation_batches
from train.data.loader_config import LoaderConfig
from train.data.plan import EvalPlan
from train.exits import UsageError
from train.loop.evaluate import EvaluationStoppedError
from train.loop.evaluate import evaluate as loop_evaluate
from train.tasks.base import Ratio


class Samples:
    def __init__(self, size):
        generator = torch.Generator().manual_seed(1)
        self.values = torch.rand(size, generator=generator)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"x": self.values[index], "weight": torch.tensor(1.0 + index % 3)}


class Task(TinyTask):
    """A weighted mean and, from torchmetrics, a maximum, which is not a ratio of sums."""

    def __init__(self):
        pass

    def metrics(self):
        from torchmetrics import MaxMetric

        return {"largest": MaxMetric()}

    def measure(self, model, batch):
        weighted = Ratio((batch["x"] * batch["weight"]).sum(), batch["weight"].sum())
        return {"loss": weighted, "largest": (batch["x"],)}

    def derive(self, totals):
        total, count = totals["loss"]
        assert (totals["loss"].sum, totals["loss"].count) == (total, count)
        return {"twice": 2 * total / count}


def batches(size, micro, rank=0, world=1):
    return evaluation_batches(
        Samples(size), EvalPlan(size, micro, world), rank, seed=1,
        collate=torch.utils.data.default_collate, config=LoaderConfig(), device_type="cpu",
    )  # fmt: skip


def evaluate(task, batches, model=None, collectives=None, **options):
    model, own = model or torch.nn.Linear(1, 1), engine()
    own.collectives = collectives or own.collectives
    return loop_evaluate(own, lambda function: function(model), model, task, batches, **options)


@pytest.mark.parametrize("micro", [1, 4, 37, 100])
def test_any_micro_batch_size_gives_the_metrics_of_the_dataset(micro):
    data = Samples(37)
    weights = 1 + torch.arange(37) % 3
    expected = ((data.values.double() * weights).sum() / weights.sum()).item()
    with batches(37, micro) as loaded:
        found = evaluate(Task(), loaded)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["twice"] == pytest.approx(2 * expected, rel=1e-6)
    assert found["largest"] == pytest.approx(data.values.max().item())


def test_rounds_that_only_keep_ranks_in_step_do_not_count():
    """The last of three ranks has no samples in the second round."""
    data, seen = Samples(7), []

    class Watching(Task):
        def measure(self, model, batch):
            seen.append(len(batch["x"]))
            return super().measure(model, batch)

    found = []
    for rank in range(3):
        with batches(7, 2, rank, 3) as loaded:
            found.append(evaluate(Watching(), loaded))
    assert len(seen) == 6, "every rank must compute in every round"
    plan = EvalPlan(7, 2, 3)
    for rank in range(3):
        bounds = [plan.bounds(rank, number) for number in range(plan.rounds)]
        mine = torch.cat([torch.arange(*b) for b in bounds])
        weights = 1 + mine % 3
        expected = ((data.values[mine] * weights).sum() / weights.sum()).item()
        assert found[rank]["loss"] == pytest.approx(expected, nan_ok=True)


def test_the_model_is_in_eval_mode_and_then_in_train_mode_again():
    model, modes = torch.nn.Linear(1, 1), []

    class Watching(Task):
        def measure(self, model, batch):
            modes.append((model.training, torch.is_grad_enabled()))
            return super().measure(model, batch)

    with batches(3, 2) as loaded:
        evaluate(Watching(), loaded, model)
    assert modes == [(False, False)] * 2
    assert model.training


def test_a_stop_request_ends_it_between_two_batches():
    asked = iter([False, False, True])
    model = torch.nn.Linear(1, 1)
    with pytest.raises(EvaluationStoppedError), batches(9, 1) as loaded:
        evaluate(Task(), loaded, model, stop=lambda: next(asked))
    assert model.training


def test_metrics_that_only_some_ranks_have_are_merged_by_name():
    """One metric per class of the batch; with one sample per micro-batch, no rank has all."""

    class ByClass(Task):
        def metrics(self):
            return {}

        def measure(self, model, batch):
            found = {}
            for weight, x in zip(batch["weight"].tolist(), batch["x"], strict=True):
                total, count = found.get(f"class {weight:g}", (0, 0))
                found[f"class {weight:g}"] = Ratio(total + x, count + 1)
            return found

        def derive(self, totals):
            return {"classes": len(totals)}

    def measured(collectives):
        with batches(7, 1, collectives.rank, collectives.world_size) as loaded:
            return evaluate(ByClass(), loaded, collectives=collectives)

    [alone], three = on_ranks(1, measured), on_ranks(3, measured)
    assert alone.keys() == {"class 1", "class 2", "class 3", "classes"}
    assert three == [pytest.approx(alone, rel=1e-6)] * 3


def test_a_wrong_return_value_of_measure_is_reported():
    class Wrong(Task):
        def measure(self, model, batch):
            return {"loss": batch["x"].mean()}

    with pytest.raises(UsageError, match=r"Tensor for 'loss'.*Ratio"), batches(3, 2) as loaded:
        evaluate(Wrong(), loaded)


def test_a_ratio_is_not_taken_for_the_arguments_of_a_metric_object():
    """MeanMetric takes two arguments: a value and a weight."""
    from torchmetrics import MeanMetric

    class Both(Task):
        def metrics(self):
            return {"loss": MeanMetric()}

    with pytest.raises(UsageError, match=r"Ratio for 'loss'.*update"), batches(3, 2) as loaded:
        evaluate(Both(), loaded)


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(tmp_path):
    """37 samples in micro-batches of 18: the second rank has no samples in the last round."""
    import json

    rules = ["length.steps=2", "schedule.warmup_steps=0", "evaluate.micro_batch_size=18"]
    run("fit", tmp_path, *rules)
    alone = run("evaluate", tmp_path, *rules, "--json")
    both = run("evaluate", tmp_path, *rules, "--json", processes=2)
    expected = json.loads(alone.stdout)
    assert json.loads(both.stdout)["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("derived", "said"),
    [
        ({"x": "3"}, "derive.. returned str for 'x'; return a number"),
        ({"x": None}, "derive.. returned NoneType for 'x'"),
        ({"x": torch.ones(2)}, "returned Tensor of shape .2,. for 'x'"),
        ({None: 1.0}, "derive.. returned the name None, which is not text"),
        ({"\ud800": 1.0}, "half of a surrogate pair"),
        ({"x": 10**400}, "derive.. returned int for 'x'; return a number"),
        ([1.0], "derive.. returned list"),
    ],
)
def test_a_derived_metric_that_is_not_a_number_is_refused(derived, said):
    class Wrong(Task):
        def derive(self, totals):
            return derived

    with pytest.raises(UsageError, match=said), batches(3, 2) as loaded:
        evaluate(Wrong(), loaded)


def test_scalars_of_torch_and_numpy_become_numbers():
    import numpy as np

    class Scalars(Task):
        def derive(self, totals):
            return {"torch": torch.tensor(2.5), "numpy": np.float32(1.5), "whole": 3}

    with batches(3, 2) as loaded:
        found = evaluate(Scalars(), loaded)
    assert (found["torch"], found["numpy"], found["whole"]) == (2.5, 1.5, 3.0)
    assert {type(value) for value in found.values()} == {float}
