"""A rank is killed, or gets SIGTERM, in each phase of a run, under torchrun's restarts."""

import json
import signal
import subprocess

import pytest

from tests.support.forked import quick, quick_run
from tests.support.forked import run as run_forked
from tests.support.lanes import thinned
from tests.support.runs import ROOT, checkpoints, command, curve
from train.data.ledger import read_steps
from train.parity.compare import largest_difference

BASE = [
    "checkpoint.every_steps=5", "evaluate.every_steps=10", "batch.micro_batch_size=6",
    "task.use=tests.faults.tasks:HitOnce",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run_forked("fit", directory, *BASE)
    return directory


def torchrun(directory, *overrides, restarts=0):
    words = command("fit", directory, *BASE, *overrides, processes=2)
    at = words.index("--nproc-per-node")
    words[at:at] = ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return subprocess.run(
        **quick(words), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


def attempts(directory):
    return [json.loads(line) for line in (directory / "attempts.jsonl").open()]


def assert_as_undisturbed(undisturbed, directory):
    assert "all well" in run_forked("verify", directory).stdout
    assert read_steps(undisturbed / "ledger.bin") == read_steps(directory / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        assert largest_difference(curve(undisturbed, key), curve(directory, key)) <= 1e-5


@pytest.mark.parametrize(
    "phase", thinned(["start-up", "step", "save", "evaluation"], kept=["save"])
)
def test_a_killed_rank(undisturbed, tmp_path, phase):
    done = torchrun(tmp_path, f"task.phase={phase}", f"task.number={signal.SIGKILL}", restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hit").read_text() == phase
    assert_as_undisturbed(undisturbed, tmp_path)
    assert len(attempts(tmp_path)) == (1 if phase == "start-up" else 2)


@pytest.mark.parametrize(
    "phase",
    thinned(
        ["start-up", "step", "save", "evaluation", "loading data"],
        kept=[],
    ),
)
def test_a_stop_request_to_one_rank(undisturbed, tmp_path, phase):
    """One rank gets SIGTERM; both agree, save and exit within the default deadline."""
    done = torchrun(tmp_path, f"task.phase={phase}", f"task.number={signal.SIGTERM}")
    assert (tmp_path / "hit").read_text() == phase
    assert done.stderr.count("exitcode  : 143") == 2, done.stderr
    assert "it is saved" in done.stdout
    saved = checkpoints(tmp_path)[-1]
    assert saved < 40
    quick_run("fit", tmp_path, *BASE, processes=2)
    assert attempts(tmp_path)[-1]["resumed_from_step"] == saved
    assert_as_undisturbed(undisturbed, tmp_path)


def test_torchrun_shows_the_error_of_the_rank_that_failed_first(tmp_path):
    done = torchrun(tmp_path, "data.fail_at=50")
    assert done.returncode == 1
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "this sample is broken" in cause
    assert "exitcode  : 65" in cause
