"""A model that comes in half precision is trained in fp32, on every placement alike."""

import json

import pytest
import torch
from torch import nn

import train
from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import curve, tensors
from tests.support.tiny import TinyTask
from train.parity.compare import largest_difference
from train.strategies.parameters import to_fp32

HALF = ["task.use=tests.strategies.test_weights_dtype:HalfTask", "length.steps=8"]
HALF += ["batch.micro_batch_size=6", "evaluate.every_steps=4"]


class HalfTask(TinyTask):
    """Its model is in bf16, as ``from_pretrained`` may give it; a part is frozen."""

    def build_model(self):
        frozen = nn.Linear(16, 16).requires_grad_(False)
        model = nn.Sequential(nn.Linear(8, 16), frozen, nn.BatchNorm1d(16).eval(), nn.Linear(16, 4))
        return model.bfloat16()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    done = run("fit", directory, *HALF)
    said = "(converted to fp32, in which weights are trained: 0.weight, 0.bias, 1.weight and "
    assert said in done.stdout
    return directory


def test_weights_moments_and_averages_are_in_fp32(alone):
    stored = tensors(alone)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float32}
    drawn = stored["model.1.weight"]
    assert torch.equal(drawn, drawn.bfloat16().float()), "the frozen weight has changed"
    trained = stored["model.0.weight"]
    assert not torch.equal(trained, trained.bfloat16().float()), "the weight is rounded to bf16"


@pytest.mark.parametrize("strategy", [slow("ddp"), "fsdp2", slow("zero1"), "zero3"])
def test_every_strategy_gives_the_same_run(alone, tmp_path, strategy):
    run_ranks(2, "fit", tmp_path, *HALF, f"strategy={strategy}")
    for key in ("train/loss", "eval/loss"):
        assert largest_difference(curve(alone, key), curve(tmp_path, key)) <= 1e-5


def test_evaluation_and_export_use_fp32(alone, tmp_path):
    done = run("evaluate", alone, *HALF, "--json")
    last = list(curve(alone, "eval/loss").values())[-1]
    assert json.loads(done.stdout)["loss"] == pytest.approx(last, rel=1e-6)
    run("export", alone, *HALF, "--to", tmp_path / "export")
    assert train.load(tmp_path / "export", trust=True)[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_only_what_trains_must_be_in_fp32_under_autocast(dtype):
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)}).to(dtype)
    model["trunk"].requires_grad_(False)
    assert to_fp32(model, "bf16") == [
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"
    ]  # fmt: skip
    assert model["trunk"].weight.dtype == dtype
    assert model["norm"].num_batches_tracked.dtype == torch.int64


def test_shared_weights_stay_shared():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model.bfloat16()
    assert to_fp32(model, "fp32") == ["a.weight"]
    assert model["b"].weight is model["a"].weight
