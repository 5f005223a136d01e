"""``torchx run -s slurm`` on a real Slurm without accounting, which plain TorchX does not
support."""

import json
import re

import pytest

from tests.real.slurm.conftest import Job
from tests.support.runs import TINY, checkpoints, run

pytestmark = pytest.mark.slow


@pytest.fixture
def torchx(user):
    """Runs TorchX's command in a directory for its logs."""

    def call(*words, before=()):
        done = user.run(*before, "torchx", *words, cwd=user.home)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def submit(torchx, user, directory, *overrides, options=(), before=()):
    told = torchx(
        "run", "-s", "slurm", "isorun.fit", "-j", "2x1", "--cpu", "2", "--memMB", "500",
        "--preflight", "off", *options, *TINY, f"run.dir={directory}", *overrides,
        before=before,
    )  # fmt: skip
    return Job(user, re.search(r"slurm://torchx/(\d+)$", told, re.MULTILINE)[1])


def history(user):
    """The output of ``python -m launch history``."""
    done = user.run("python", "-m", "launch", "history")
    assert done.returncode == 0, done.stderr
    return done.stdout


def ledger(user):
    return [json.loads(line) for line in (user.home / "state/isorun/launches.jsonl").open()]


def said(user, job, node=0):
    files = (user.home / f"slurm-{job.number}-fit-{node}.{end}" for end in ("out", "err"))
    return "\n".join(file.read_text() for file in files)


def test_two_nodes_train_to_the_end(torchx, user, tmp_path):
    job = submit(torchx, user, tmp_path / "run")
    assert job.end() == ("COMPLETED", 0), said(user, job)
    assert "Placement: 2 x cpu on 2 hosts (node1, node2)" in said(user, job)
    assert "all well" in run("verify", tmp_path / "run").stdout
    handle = f"slurm://torchx/{job.number}"
    status = torchx("status", handle)
    assert "State: SUCCEEDED" in status
    assert "fit[1]:SUCCEEDED" in status
    assert "Finished: 40 steps" in torchx("log", "--streams", "stdout", f"{handle}/fit/0")
    assert re.search(rf"{handle} +SUCCEEDED", torchx("list", "-s", "slurm"))
    assert re.search(rf"slurm +2 +SUCCEEDED +{handle}", history(user))
    # Each agent has the cores of the job, and a port derived from the job's id.
    script = ledger(user)[0]["request"]
    assert script.count("--cpus-per-task=2") == 4
    assert re.search(r"PET_RDZV_PORT=[12]\d{4}\b", script)


def test_a_job_from_the_shell_of_an_allocation_gets_its_own_resources(torchx, user, tmp_path):
    srun = ("srun", "--nodes=1", "--ntasks=1", "--mem-per-cpu=200", "--cpu-bind=cores")
    job = submit(torchx, user, tmp_path / "run", before=srun)
    assert job.end() == ("COMPLETED", 0), said(user, job)
    assert "2 hosts (node1, node2)" in said(user, job)
    assert "\x1b" not in said(user, job), "srun must not give tasks a terminal"
    assert "all well" in run("verify", tmp_path / "run").stdout


def test_a_failure_worth_a_retry_is_requeued(torchx, user, tmp_path):
    killed = submit(
        torchx, user, tmp_path / "run", "task.kill_at_step=5", options=("--max_retries", "1")
    )
    killed.wait_for(lambda: killed.restarts == 1)  # Slurm waits before it restarts a job


def test_a_failure_that_would_repeat_is_not_requeued(torchx, user, tmp_path):
    broken = submit(
        torchx, user, tmp_path / "run", "data.fail_at=20", options=("--max_retries", "1")
    )
    assert broken.end() == ("FAILED", 65), said(user, broken)
    assert broken.restarts == 0
    assert "FAILED (65)" in history(user)
    told = user.run("python", "-m", "launch", "why", f"slurm://torchx/{broken.number}").stdout
    assert "exit code 65 (DATA)" in told


def test_a_cancelled_job_has_saved(torchx, user, tmp_path):
    directory = tmp_path / "run"
    job = submit(torchx, user, directory, "task.sleep=0.05", "length.steps=10000")
    job.trains(directory)
    torchx("cancel", f"slurm://torchx/{job.number}")
    assert job.end()[0] == "CANCELLED"
    assert checkpoints(directory)
    assert "CANCELLED" in history(user)
