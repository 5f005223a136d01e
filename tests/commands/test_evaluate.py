"""``evaluate`` gives the run's own metrics for any checkpoint, on any number of processes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import train
from tests.support.forked import command, quick_run, run, run_ranks
from tests.support.runs import TINY, curve
from tests.support.tiny import TinyTask
from train.checkpoint.run_view import Run
from train.commands.checkpoints import find_checkpoint
from train.exits import ResumeRefusedError, UsageError

BEST = ["checkpoint.keep_best.metric=loss", "checkpoint.keep_best.mode=min"]
BASE = ["evaluate.every_steps=5", "checkpoint.every_steps=5", "checkpoint.keep_last=99", *BEST]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    run("fit", directory, *BASE)
    return directory


def evaluate(directory, *words, **kwargs):
    return json.loads(run("evaluate", directory, *BASE, "--json", *words, **kwargs).stdout)


def test_the_newest_checkpoint_matches_the_final_evaluation_bitwise(finished):
    found = evaluate(finished)
    assert found["loss"] == json.loads((finished / "finished.json").read_text())["metrics"]["loss"]
    assert found["checkpoint"] == str(finished / "checkpoints/step-000000000040")
    assert evaluate(finished, "--checkpoint", "newest") == found


@pytest.mark.slow
def test_a_checkpoint_by_best_by_step_and_by_path(finished):
    losses = curve(finished, "eval/loss")
    best = min(losses, key=losses.get)
    assert best != 40
    assert evaluate(finished, "--checkpoint", "best")["loss"] == losses[best]
    assert evaluate(finished, "--checkpoint", "15")["loss"] == losses[15]
    path = finished / "checkpoints/step-000000000020"
    assert evaluate(finished, "--checkpoint", path)["loss"] == losses[20]
    assert evaluate(finished, "--checkpoint", f"{path}/")["loss"] == losses[20]
    # A path does not depend on the run directory in the config.
    here = run("evaluate", finished, *BASE, "--json", "--checkpoint", path, "run.name=other")
    assert json.loads(here.stdout)["loss"] == losses[20]


def test_without_json_the_output_is_a_readable_table(finished):
    lines = run("evaluate", finished, *BASE).stdout.splitlines()
    assert lines[0] == f"{finished / 'checkpoints/step-000000000040'} on 37 samples"
    assert lines[1].split() == ["loss", f"{curve(finished, 'eval/loss')[40]:.6g}"]


@pytest.mark.parametrize(
    ("which", "code", "expected"),
    [
        ("7", 64, "There is no checkpoint of step 7 in "),
        ("latest", 64, "--checkpoint is 'latest', which is not newest, best, a step, or"),
        ("/nowhere/at/all", 64, "or the path of a checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_exist(finished, which, code, expected):
    done = run("evaluate", finished, *BASE, "--checkpoint", which, expect=code)
    (line,) = done.stderr.splitlines()
    assert expected in line
    if which == "7":
        assert "choose one of the steps 5, 10, 15, 20, 25, 30, 35, 40." in line


def test_best_needs_a_metric_that_was_evaluated(finished):
    plain = [item for item in BASE if item not in BEST]
    done = run("evaluate", finished, *plain, "--checkpoint", "best", expect=64)
    assert "checkpoint.keep_best is not set" in done.stderr
    other = [*plain, "checkpoint.keep_best.metric=accuracy"]
    done = run("evaluate", finished, *other, "--checkpoint", "best", expect=64)
    assert "evaluation with the metric 'accuracy'" in done.stderr


def test_a_run_that_does_not_exist(tmp_path):
    done = run("evaluate", tmp_path / "none", expect=64)
    (line,) = done.stderr.splitlines()
    assert f"There is no checkpoint in {tmp_path / 'none/checkpoints'}" in line
    assert "-m train fit" in line
    assert not (tmp_path / "none").exists(), "evaluate created the directory"


def test_a_damaged_checkpoint_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    path = copy / "checkpoints/step-000000000040/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-7])
    done = run("evaluate", copy, *BASE, expect=65)
    (line,) = done.stderr.splitlines()
    assert "is damaged: " in line
    assert "__0_0.distcp has" in line
    assert evaluate(copy, "--checkpoint", "35")["loss"] == curve(finished, "eval/loss")[35]
    assert path.parent.exists(), "only fit may rename a damaged checkpoint"


def test_two_processes_give_the_same_metrics(finished):
    done = quick_run("evaluate", finished, *BASE, "--json", processes=2)
    (line,) = [item for item in done.stdout.splitlines() if item.startswith("{")]
    assert json.loads(line)["loss"] == pytest.approx(evaluate(finished)["loss"], rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 5, 37])
def test_the_micro_batch_size_does_not_change_the_metrics(finished, micro_batch_size):
    """Some of the three ranks have no samples in the last round."""
    rule = f"evaluate.micro_batch_size={micro_batch_size}"
    first, *others = run_ranks(3, "evaluate", finished, *BASE, rule, "--json")
    assert json.loads(first.stdout)["loss"] == pytest.approx(evaluate(finished)["loss"], rel=1e-6)
    assert [other.stdout for other in others] == ["", ""]


def test_a_config_with_another_model_is_refused(tmp_path, capsys):
    """Dropout has no tensors, so that the checkpoint itself fits."""
    where = [*TINY, "length.steps=6", "track.console=quiet", f"run.dir={tmp_path}"]
    done = train.fit(*where)
    with pytest.raises(ResumeRefusedError) as caught:
        train.evaluate(*where, "model.dropout=0.5", "data.size=50")
    assert "\n  model.dropout: 0.1 -> 0.5 (command line)\nUndo them" in str(caught.value)
    assert "data.size" not in str(caught.value)
    assert train.evaluate(*where, "task.sleep=0.01") == pytest.approx(done.metrics)
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ResumeRefusedError, match=r"data.size: 103 -> 50 \(command line\)\n.*--other"
    ):
        train.evaluate(*where, "data.size=50")
    train.evaluate(*where, "data.size=50", other_data=True)
    # The seed decides how random numbers split the data.
    with pytest.raises(ResumeRefusedError, match=r"run.seed: 0 -> 5 \(command line\)\n.*--other"):
        train.evaluate(*where, "run.seed=5")
    train.evaluate(*where, "run.seed=5", other_data=True)
    other = [w.replace(str(tmp_path), str(tmp_path / "other")) for w in where]
    train.fit(*other, "run.seed=5")
    with pytest.raises(ResumeRefusedError, match="run.seed: 5 -> 0"):
        train.evaluate(tmp_path, checkpoint=Run(tmp_path / "other").checkpoints[-1].path)


def test_the_directory_of_a_run_stands_for_its_config(finished, tmp_path):
    """Also if it was moved, and with values that do not change the run."""
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    done = command("evaluate", moved, "evaluate.micro_batch_size=5", "--json")
    assert json.loads(done.stdout)["loss"] == pytest.approx(evaluate(finished)["loss"], rel=1e-6)
    for words in (["verify", moved], ["export", moved, "--to", tmp_path / "out"]):
        command(*words)
    assert (tmp_path / "out" / "model.safetensors").exists()
    refused = command("evaluate", moved, "model.hidden=17", expect=76)
    assert "model.hidden: 16 -> 17 (command line)" in refused.stderr
    assert (
        "no config file or run directory 'nothing'"
        in command("verify", "nothing", expect=64).stderr
    )
    (tmp_path / "empty").mkdir()
    assert "not that of a run" in command("verify", tmp_path / "empty", expect=64).stderr


def test_overrides_without_effect_get_a_warning(tmp_path, capsys):
    where = [*TINY, "length.steps=6", "track.console=quiet", f"run.dir={tmp_path}"]
    done = train.fit(*where)
    train.evaluate(*where, "optim.lr=0.01", "batch.global_batch_size=6", "evaluate.at_end=true")
    assert capsys.readouterr().err == "", "values that are the run's, or that an evaluation uses"
    assert train.evaluate(*where, "optim.lr=5", "schedule.use=linear") == done.metrics
    (line,) = capsys.readouterr().err.splitlines()
    assert "no effect on this command: optim.lr (5.0; the run has 0.01), schedule.use (" in line


def test_a_model_that_lacks_tensors_of_the_checkpoint_is_refused(tmp_path, monkeypatch):
    where = [*TINY, "length.steps=6", "track.console=quiet", f"run.dir={tmp_path}"]
    train.fit(*where)
    monkeypatch.setattr(
        TinyTask, "build_model", lambda self: torch.nn.Sequential(torch.nn.Linear(8, 16))
    )
    with pytest.raises(ResumeRefusedError, match=r"model.1.bias is only in the .*that wrote it\.$"):
        train.evaluate(*where)


@pytest.mark.parametrize("which", ["\u00b2", "1\u0663", "9" * 30])
def test_a_step_has_ascii_digits(tmp_path, which):
    with pytest.raises(UsageError, match="which is not newest, best, a step"):
        find_checkpoint(SimpleNamespace(run_directory=tmp_path), which)
