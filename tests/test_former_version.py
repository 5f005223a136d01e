"""Run directories of version 0.1.0 open, verify, resume and can be read.

``tests/data/run-0.1.0`` was written by that version. It holds a run of one process and a run of two
ranks, both of 40 steps and stopped by their ``stop`` file during the evaluation at step 16; the
metrics of the same runs without a stop; and the ledger of a launch.
"""

import json
import shutil

import pytest

from launch.cli import main as launch
from tests.support.forked import run, run_ranks
from tests.support.runs import ROOT, checkpoints, curve, metrics

DATA = ROOT / "tests/data/run-0.1.0"
KEPT = ["checkpoint.every_steps=10", "evaluate.every_steps=8", "task.sleep=0"]
SINGLE = [*KEPT, "ema.decay=0.9", "run.name=single", "checkpoint.keep_best.metric=loss"]
TWO_RANKS = [*KEPT, "run.name=two-ranks", "strategy=fsdp2"]


def uninterrupted(name, key):
    """Maps steps to the values that version 0.1.0 logged in the same run without a stop."""
    found = json.loads((DATA / "uninterrupted.json").read_text())[name][key]
    return {int(step): value for step, value in found.items()}


@pytest.fixture
def single(tmp_path):
    return shutil.copytree(DATA / "single", tmp_path / "single")


@pytest.fixture
def two_ranks(tmp_path):
    return shutil.copytree(DATA / "two-ranks", tmp_path / "two-ranks")


def check_finished(directory):
    """Checks that each step was logged once, with the loss that version 0.1.0 logged."""
    assert [row["step"] for row in metrics(directory)] == list(range(1, 41))
    # The second attempt adds the evaluation that the first attempt did not finish.
    assert [row["attempt"] for row in metrics(directory)] == [1] * 15 + [2] * 25
    assert curve(directory) == pytest.approx(uninterrupted(directory.name, "train/loss"), rel=1e-4)
    finished = json.loads((directory / "finished.json").read_text())
    assert (finished["step"], finished["position"], finished["attempt"]) == (40, 480, 2)
    assert "all well" in run("verify", directory).stdout


def test_a_run_verifies_and_its_checkpoint_evaluates(single):
    said = run("verify", single).stdout
    assert "checkpoint step 16: ok" in said
    assert "16 steps, positions 0 to 191, each used exactly once" in said
    assert said.endswith("all well\n")
    found = json.loads(run("evaluate", single, "--json", *SINGLE).stdout)
    assert found["loss"] == pytest.approx(uninterrupted("single", "eval/loss")[16], rel=1e-4)


def test_a_run_resumes_and_finishes(single):
    said = run("fit", single, *SINGLE).stdout
    assert "attempt 2" in said
    check_finished(single)
    assert curve(single, "eval/loss") == pytest.approx(
        uninterrupted("single", "eval/loss"), rel=1e-4
    )
    identity = json.loads((single / "run.json").read_text())
    assert identity == json.loads((DATA / "single/run.json").read_text())


def test_a_run_of_two_ranks_resumes_on_one_process(two_ranks):
    run("fit", two_ranks, *TWO_RANKS, "strategy=auto", "batch.micro_batch_size=6")
    check_finished(two_ranks)


def test_a_run_of_two_ranks_resumes_on_two(two_ranks):
    run_ranks(2, "fit", two_ranks, *TWO_RANKS)
    check_finished(two_ranks)


def test_a_changed_config_is_still_refused(single):
    done = run("fit", single, *SINGLE, "optim.lr=0.02", expect=76)
    assert "optim.lr: 0.01 -> 0.02 (command line)" in done.stderr
    assert checkpoints(single) == [10, 16]


def test_its_launches_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "isorun").mkdir()
    shutil.copy(DATA / "launches.jsonl", tmp_path / "isorun")
    assert launch(["history"]) == 0
    said = capsys.readouterr().out
    assert "launched-20261125-214413-7643f0" in said
    assert "SUCCEEDED" in said
