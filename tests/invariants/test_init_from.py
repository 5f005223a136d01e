"""I1 to I4 for runs that start from existing weights: the same weights and the same curve on any
placement, loaded until the run has a checkpoint of its own, and not any more then.
"""

import json
import shutil

import pytest
import torch

from tests.support.forked import command, run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import curve, tensors

PARTS = "model.parts=[tied, frozen-bf16, adapted, constants, scalar, empty, transposed]"
BASE = [
    "task.use=tests.support.odd:OddTask", PARTS, "batch.micro_batch_size=3", "length.steps=4",
    "schedule.warmup_steps=0", "evaluate.at_start=true", "ema.decay=0.9",
]  # fmt: skip
# A step that changes no weight, so that the checkpoint has those that were loaded.
STILL = ["length.steps=1", "optim.lr=1e-30"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that was trained with fsdp2."""
    directory = tmp_path_factory.mktemp("base")
    run_ranks(2, "fit", directory, *BASE, "run.seed=5", "strategy=fsdp2")
    return directory


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *BASE, f"init_from={base}")
    return directory


def records(directory):
    lines = (directory / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line).get("init_from") for line in lines]


def fit(placement, directory, *overrides):
    """``placement``: a strategy for two ranks, or ``single`` for one process."""
    if placement == "single":
        run("fit", directory, *overrides)
    else:
        run_ranks(2, "fit", directory, *overrides, f"strategy={placement}")


@pytest.mark.parametrize(
    "placement", ["single", "zero3", slow("ddp"), slow("fsdp2"), slow("zero1"), slow("zero2")]
)
def test_the_weights_are_bitwise_those_of_the_source(base, placement, tmp_path):
    fit(placement, tmp_path, *BASE, *STILL, f"init_from={base}")
    source, loaded = tensors(base), tensors(tmp_path)
    names = [name for name in source if name.startswith("model.")]
    assert len(names) > 10
    for name in names:
        assert torch.equal(source[name], loaded[name]), name
    averages = [name for name in source if name.startswith("ema.")]
    for name in averages:
        assert torch.equal(source[f"model.{name[4:]}"], loaded[name]), name
    [record] = records(tmp_path)
    assert (record["step"], record["tensors"]) == (4, len(names))


@pytest.mark.parametrize("placement", ["ddp", slow("fsdp2"), slow("zero3")])
def test_the_curve_is_the_same_on_each_placement(base, alone, placement, tmp_path):
    fit(placement, tmp_path, *BASE, f"init_from={base}")
    for key in ("train/loss", "eval/loss"):
        one, other = curve(alone, key), curve(tmp_path, key)
        assert one.keys() == other.keys()
        for step, value in one.items():
            assert value == pytest.approx(other[step], rel=1e-5), (key, step)
    assert curve(tmp_path, "eval/loss")[0] != curve(base, "eval/loss")[0]


def test_an_export_is_a_source(tmp_path):
    parts = "model.parts=[tied, frozen-bf16, constants]"
    run("fit", tmp_path / "base", *BASE, parts)
    command("export", tmp_path / "base", "--form", "parameters", "--to", tmp_path / "export")
    run("fit", tmp_path / "run", *BASE, parts, *STILL, f"init_from={tmp_path / 'export'}")
    source, loaded = tensors(tmp_path / "base"), tensors(tmp_path / "run")
    for name in (name for name in source if name.startswith("ema.")):
        assert torch.equal(source[name], loaded[f"model.{name[4:]}"]), name


@pytest.mark.slow
def test_the_source_is_read_until_there_is_a_checkpoint(base, tmp_path):
    copy, directory = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, copy)
    options = [*BASE, f"init_from={copy}"]
    run("fit", directory, *options, "task.kill_at_step=2", expect=-9)
    run("fit", directory, *options, "length.steps=3")
    shutil.rmtree(copy)
    run("fit", directory, *options, "length.steps=3")  # it is finished
    run("fit", directory, *options, "--allow-changes")
    first, second, resumed = records(directory)
    assert first == second
    assert first["step"] == 4
    assert resumed is None
    other = run("fit", directory, *BASE, "init_from=null", expect=76)
    assert "init_from: {'source': " in other.stderr
    assert "-> None" in other.stderr


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_a_missing_source_is_refused_on_every_rank(ranks, tmp_path):
    options = ["fit", tmp_path / "run", *BASE, f"init_from={tmp_path / 'none'}"]
    done = [run(*options, expect=64)] if ranks == 1 else run_ranks(2, *options, expect=64)
    for result in done:
        assert "there is no such file or directory" in result.stderr
        assert "Traceback" not in result.stderr
