"""The batch file's judgement of exit codes, in a world where srun and scontrol are shell scripts."""

import os
import subprocess

import pytest

from tests.launch.launching import dryrun
from tests.support.runs import ROOT, TINY
from train.exits import Exit, is_worth_retrying

CODES = sorted({*Exit, 1, 2, 128, 129, 134, 137, 139})


def starts_again(directory, script, code, **environ):
    """Whether a batch script asks for another start when srun ends like this; its exit code."""
    for name, text in {
        "srun": f'echo "$@" > {directory}/srun.said; exit {code}',
        "scontrol": f"echo $@ > {directory}/scontrol.said; exit ${{REFUSED:-0}}",
    }.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    (directory / "scontrol.said").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", script, "--config", "my config.yaml"], capture_output=True, text=True,
        env={"PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007",
             "SLURM_NNODES": "2", **environ},
    )  # fmt: skip
    asked = (directory / "scontrol.said").exists()
    assert not asked or (directory / "scontrol.said").read_text() == "requeue 20007\n"
    return asked, done.returncode


FILE = ROOT / "configs/slurm/fit.sbatch"


@pytest.mark.parametrize("code", CODES)
def test_only_what_may_help_is_tried_again(tmp_path, code):
    again = is_worth_retrying(code)
    assert starts_again(tmp_path, FILE, code) == (again, 0 if again else code)


def test_failures_of_machines_are_not_tried_for_ever(tmp_path):
    assert starts_again(tmp_path, FILE, 75, SLURM_RESTART_COUNT="19") == (True, 0)
    assert starts_again(tmp_path, FILE, 75, SLURM_RESTART_COUNT="20") == (False, 75)
    assert starts_again(tmp_path, FILE, 143, SLURM_RESTART_COUNT="20") == (True, 0)


def test_where_starting_again_is_refused_the_code_is_the_agents(tmp_path):
    assert starts_again(tmp_path, FILE, 143, REFUSED="1") == (True, 143)


def test_what_the_agents_are_told(tmp_path):
    starts_again(tmp_path, FILE, 0, SLURM_CPUS_PER_TASK="7")
    said = (tmp_path / "srun.said").read_text()
    assert "--rdzv-port 10007 " in said
    assert "--cpus-per-task 7 python -m launch.agent --nnodes 2 " in said
    assert said.endswith("-- python -m train fit --config my config.yaml\n")


@pytest.mark.parametrize("code", CODES)
def test_so_it_is_with_torchx(tmp_path, code):
    """Whose own script would start anything again."""
    request = dryrun("isorun.fit", "--max_retries", "2", *TINY, scheduler="slurm").request
    script = tmp_path / "script"
    script.write_text(request.materialize())
    again = is_worth_retrying(code)
    assert starts_again(tmp_path, script, code) == (again, code)
    assert starts_again(tmp_path, script, code, SLURM_RESTART_COUNT="2") == (False, code)
