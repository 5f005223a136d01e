"""The task ``autograd``: a derivative written by hand, and hooks that record gradients."""

import json

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from train.tasks.autograd.function import Legendre3
from train.tasks.autograd.gradients import GradientStatistics

BASE = ["--config", "configs/autograd.yaml", "track.tensorboard=false", "track.wandb=disabled"]


def points():
    return torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()


def test_the_derivative_is_that_of_the_function():
    assert torch.autograd.gradcheck(Legendre3.apply, (points(),))
    assert torch.autograd.gradgradcheck(Legendre3.apply, (points(),))


def test_a_wrong_derivative_is_found(monkeypatch):
    monkeypatch.setattr(Legendre3, "backward", staticmethod(lambda ctx, gradient: gradient))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Legendre3.apply, (points(),))


def test_the_statistics_are_those_of_the_gradients():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    statistics = GradientStatistics()
    statistics.watch(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        model(torch.ones(1, 2))  # an evaluation changes nothing
    (3.0 * model(torch.ones(1, 2))).sum().backward()
    header, after, before = (line.split() for line in statistics.table().splitlines())
    assert header == ["module", "mean", "largest", "zero"]
    assert after == ["1", "3.000e+00", "3.000e+00", "0.0%"]
    assert before == ["0", "1.500e+00", "3.000e+00", "50.0%"]  # the ReLU is off for one unit


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("autograd") / "run"
    run("fit", directory, base=BASE)
    return directory


def test_a_run_fits_the_curve_and_reports_its_gradients(fitted):
    assert json.loads((fitted / "finished.json").read_text())["metrics"]["loss"] < 0.1
    newest = max((fitted / "samples").glob("*.json"))
    (item,) = json.loads(newest.read_text())["items"]
    assert [line.split()[0] for line in item["text"].splitlines()] == ["module", *"3210"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", slow("ddp"), slow("zero3")])
def test_sharded_strategies_give_the_same(fitted, tmp_path, strategy):
    run_ranks(2, "fit", tmp_path, f"strategy={strategy}", base=BASE)
    one, two = (json.loads((d / "finished.json").read_text()) for d in (fitted, tmp_path))
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)
