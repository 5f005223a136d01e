"""How a job is submitted to Slurm, with a shell script for sbatch."""

import os

import pytest

from launch.history import launch_log
from launch.torchx.schedulers import create
from launch.torchx.schedulers.slurm_environment import for_submission
from tests.launch.launching import dryrun
from tests.launch.torchx.schedulers.test_requeue import LEAKED
from tests.support.runs import TINY
from train.exits import RetryError, UsageError

JOB = ("isorun.fit", "-j", "2x1", *TINY)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Replaces sbatch by these shell commands. The other programs of Slurm know no job; they would
    try for a minute to reach a controller."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def replace(text, name="sbatch"):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    for name in ("scontrol", "squeue", "sacct", "sinfo"):
        replace("exit 1", name)
    return replace


def submit(**cfg):
    return create("slurm", "torchx").schedule(dryrun(*JOB, scheduler="slurm", **cfg))


@pytest.mark.process
def test_sbatch_s_own_reason_is_reported(sbatch):
    sbatch("echo 'sbatch: error: invalid account' >&2; exit 1")
    with pytest.raises(
        UsageError, match="^Cannot submit the job to slurm: sbatch says: invalid acc"
    ):
        submit()
    sbatch("echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RetryError, match="Unable to contact slurm controller; retry later"):
        submit()


@pytest.mark.process
def test_a_job_does_not_inherit_the_allocation_of_the_shell_that_submits_it(
    sbatch, tmp_path, monkeypatch
):
    for name, value in {**LEAKED, "SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "high"}.items():
        monkeypatch.setenv(name, value)
    sbatch(f"env > {tmp_path}/env; cp $2 {tmp_path}/script; echo '12;cluster'")
    assert submit() == "12"
    seen = dict(line.strip().partition("=")[::2] for line in (tmp_path / "env").open())
    assert LEAKED.keys() & seen.keys() == set()
    assert (seen["SLURM_CONF"], seen["SBATCH_QOS"]) == ("/etc/slurm.conf", "high")
    assert seen["HOME"] == os.environ["HOME"]
    assert "--cpus-per-task" in (tmp_path / "script").read_text()


def test_an_option_of_the_job_wins_over_a_variable_of_the_user():
    mine = {"SBATCH_PARTITION": "cpu", "SBATCH_ACCOUNT": "us", "SBATCH_NO_REQUEUE": "1", "A": "b"}
    assert for_submission(mine, ["time"]) == {
        "SBATCH_PARTITION": "cpu", "SBATCH_ACCOUNT": "us", "A": "b"
    }  # fmt: skip
    assert for_submission(mine, ["partition"]) == {"SBATCH_ACCOUNT": "us", "A": "b"}


@pytest.mark.process
def test_a_job_of_several_nodes_gets_a_secret_in_its_environment_alone(
    sbatch, tmp_path, monkeypatch
):
    for name in ("ISORUN_SECRET", "ISORUN_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    sbatch(f'env > {tmp_path}/env; echo "$@" > {tmp_path}/words; cp $2 {tmp_path}/script; echo 12')
    submit()
    seen = dict(line.strip().partition("=")[::2] for line in (tmp_path / "env").open())
    secret = seen["ISORUN_SECRET"]
    assert len(secret) == 64
    for name in ("words", "script"):
        assert secret not in (tmp_path / name).read_text()
    assert secret not in launch_log.path().read_text()
    monkeypatch.setenv("ISORUN_SECRET_FILE", "/home/me/secret")
    submit()
    assert "ISORUN_SECRET=" not in (tmp_path / "env").read_text()


@pytest.mark.process
def test_srun_gives_tasks_no_terminal():
    """A terminal would make their output escape sequences, and the lines of their logs."""
    script = dryrun(*JOB, scheduler="slurm").request.materialize()
    assert "SLURM_UNBUFFEREDIO" not in script
    assert "export PYTHONUNBUFFERED=1" in script
