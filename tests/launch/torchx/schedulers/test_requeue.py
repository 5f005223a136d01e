"""The batch file requeues by exit code, tested with shell scripts for srun and scontrol."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.torchx.schedulers import requeue
from tests.launch.launching import dryrun
from tests.support.lanes import thinned
from tests.support.runs import ROOT, TINY
from train.exits import Exit, is_worth_retrying

PYTHON = Path(sys.executable).parent
CODES = sorted({*Exit, 1, 2, 128, 129, 134, 137, 139})


def starts_again(directory, script, code, **environ):
    """Whether a batch script requeues the job when srun exits with this code, and the script's own
    exit code."""
    for name, text in {
        "srun": f'echo "$@" > {directory}/srun.said; env > {directory}/srun.env; exit {code}',
        "scontrol": f'[ "$1" = requeue ] || exec echo "JobId=20007 Requeue=${{REQUEUE:-1}} CPUs/Task=${{CPUS:-1}} x=y"\n'
        f"echo $@ > {directory}/scontrol.said; echo no >&2; exit ${{REFUSED:-0}}",
    }.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    (directory / "scontrol.said").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", script, "--config", "my config.yaml"], capture_output=True, text=True,
        cwd=directory,
        env={"PATH": f"{directory}:{PYTHON}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007",
             "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "PYTHONPATH": str(ROOT),
             **environ},
    )  # fmt: skip
    (directory / "told").write_text(done.stderr)
    asked = (directory / "scontrol.said").exists()
    assert not asked or (directory / "scontrol.said").read_text() == "requeue 20007\n"
    return asked, done.returncode


FILE = ROOT / "configs/slurm/fit.sbatch"


@pytest.mark.parametrize("code", thinned(CODES, kept=[0, 64, 75, 137, 143]))
def test_only_failures_worth_a_retry_are_requeued(tmp_path, code):
    again = is_worth_retrying(code)
    assert starts_again(tmp_path, FILE, code) == (again, 0 if again else code)


@pytest.mark.process
def test_it_needs_a_job_and_scontrol(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["requeue", "143", "--most", "2"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue.main() == 64
    assert "error: SLURM_JOB_ID is not set (environment)" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert requeue.main() == 75
    assert "scontrol cannot be started (No such file" in capsys.readouterr().err


def test_a_launch_py_of_the_job_s_directory_is_not_run(tmp_path):
    (tmp_path / "launch.py").write_text("print('mine')")
    assert starts_again(tmp_path, FILE, 75) == (True, 0)


def failures(directory):
    return (directory / "isorun-20007.failures").read_text().splitlines()


def test_infrastructure_failures_have_a_limit(tmp_path):
    """Preemption and time limits do not count as failures."""
    assert starts_again(tmp_path, FILE, 75) == (True, 0)
    for count in ("1", "2", "400"):
        assert starts_again(tmp_path, FILE, 143, SLURM_RESTART_COUNT=count) == (True, 0)
    assert starts_again(tmp_path, FILE, 137, SLURM_RESTART_COUNT="401") == (True, 0)
    told = failures(tmp_path)
    assert [line.split(" ", 2)[2] for line in told] == [
        "exit code 75 on node[1-2]", "exit code 137 on node[1-2]",
    ]  # fmt: skip
    with (tmp_path / "isorun-20007.failures").open("a") as file:
        file.write("another\n" * 18)
    assert starts_again(tmp_path, FILE, 75, SLURM_RESTART_COUNT="402") == (False, 75)
    assert starts_again(tmp_path, FILE, 143, SLURM_RESTART_COUNT="403") == (True, 0)


def test_failures_of_an_earlier_job_with_the_same_id_do_not_count(tmp_path):
    (tmp_path / "isorun-20007.failures").write_text("old\n" * 20)
    assert starts_again(tmp_path, FILE, 75) == (True, 0)
    assert len(failures(tmp_path)) == 1


def test_if_failures_cannot_be_counted_each_start_counts(tmp_path):
    (tmp_path / "isorun-20007.failures").mkdir()
    assert starts_again(tmp_path, FILE, 75, SLURM_RESTART_COUNT="19") == (True, 0)
    assert starts_again(tmp_path, FILE, 75, SLURM_RESTART_COUNT="20") == (False, 75)


def test_if_requeue_is_refused_the_agent_s_exit_code_is_returned(tmp_path):
    assert starts_again(tmp_path, FILE, 143, REFUSED="1") == (True, 143)


@pytest.mark.parametrize("code", [75, 137, 143])
def test_a_job_that_slurm_may_not_requeue_is_not_said_to_be_requeued(tmp_path, code):
    assert starts_again(tmp_path, FILE, code, REQUEUE="0") == (False, code)
    told = (tmp_path / "told").read_text()
    assert f"exit code {code}; the job was submitted with --no-requeue, so it is not" in told
    assert "the job is requeued" not in told


def test_the_arguments_of_the_agents(tmp_path):
    starts_again(tmp_path, FILE, 0, CPUS="7")
    said = (tmp_path / "srun.said").read_text()
    assert "--rdzv-port 10007 " in said
    assert "--cpus-per-task 7 python -P -m launch.agent --nnodes 2 " in said
    assert said.endswith("-- python -m train fit --config my config.yaml\n")


LEAKED = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1", "SLURM_CPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "300", "SLURM_GPUS": "1", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "0", "SLURM_OVERCOMMIT": "1", "SRUN_DEBUG": "3", "PMI_RANK": "0",
    "PMIX_RANK": "0", "SLURM_UNBUFFEREDIO": "1",
}  # fmt: skip
"""What a shell in an allocation has, and sbatch passes on."""


def test_srun_gets_no_options_of_the_allocation_that_submitted_the_job(tmp_path):
    starts_again(tmp_path, FILE, 0, CPUS="7", **LEAKED)
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").open())
    assert LEAKED.keys() & seen.keys() == set()
    assert {"SLURM_JOB_ID", "SLURM_NNODES", "SLURM_JOB_NODELIST"} <= seen.keys()
    assert "--cpus-per-task 7 " in (tmp_path / "srun.said").read_text()


def test_a_job_without_cpus_per_task_leaves_them_to_srun(tmp_path):
    starts_again(tmp_path, FILE, 0)
    assert "cpus-per-task" not in (tmp_path / "srun.said").read_text()


@pytest.mark.parametrize("code", thinned(CODES, kept=[0, 64, 75, 137, 143]))
def test_torchx_jobs_requeue_by_exit_code(tmp_path, code):
    """TorchX's own script would requeue after any exit code."""
    request = dryrun("isorun.fit", "--max_retries", "2", *TINY, scheduler="slurm").request
    script = tmp_path / "script"
    script.write_text(request.materialize())
    again = is_worth_retrying(code)
    assert starts_again(tmp_path, script, code) == (again, code)
    for _ in range(2):
        again = again and starts_again(tmp_path, script, code, SLURM_RESTART_COUNT="9")[0]
    assert again == (code == Exit.PREEMPTED), "there must be two retries after failures"
