"""The same command under every launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.forked import Command, quick_python, run
from tests.support.lanes import thinned
from tests.support.runs import (
    ROOT,
    TINY,
    assert_same_bits,
    checkpoints,
    curve,
    environment,
    free_port,
    tensors,
)

BIN = Path(sys.executable).parent


def launch(words, directory, *overrides, env=None, quick=True, expect=0):
    """Runs a training by a launcher. ``quick``: by Python and Accelerate without slow imports."""
    python, variables = quick_python() if quick else (sys.executable, {})
    folder = Path(python).parent
    programs = {sys.executable: python, BIN / "accelerate": folder / "accelerate"}
    done = subprocess.run(
        [programs.get(words[0], words[0]), *words[1:], "fit", *TINY, f"run.dir={directory}", *overrides],
        cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT), **variables, **(env or {})},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, "batch.micro_batch_size=6")
    return directory


@pytest.mark.parametrize(
    ("config", "strategy"),
    thinned(
        [("single", None), ("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero1", "zero1"),
         ("zero2", "zero2"), ("zero3", "zero3")],
        kept=lambda case: case[0] == "fsdp2",
    ),
)  # fmt: skip
def test_accelerate_launch_with_our_files(alone, tmp_path, config, strategy):
    file = ROOT / f"configs/accelerate/{config}.yaml"
    port = ["--main_process_port", str(free_port())]
    words = [BIN / "accelerate", "launch", "--config_file", file, *port, "-m", "train"]
    done = launch(words, tmp_path, "batch.micro_batch_size=6")
    said = next(line for line in done.stdout.splitlines() if line.startswith("Placement: "))
    if strategy:
        assert f"started by accelerate, {strategy}, fp32" in said
    else:
        assert said.startswith("Placement: 1 x cpu, fp32")
    one, other = tensors(alone), tensors(tmp_path)
    if config.startswith("zero"):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-7)
    else:
        assert_same_bits(one, other)


@pytest.mark.slow
def test_fewer_processes_than_requested_are_reported(tmp_path):
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "train"]
    # Not quick: the run reads the command line of its parent process.
    done = launch(words, tmp_path, "length.steps=6", quick=False)
    assert "accelerate launch was asked for 2 processes but started 1" in done.stderr


@pytest.mark.slow
def test_the_deepspeed_launcher(alone, tmp_path):
    words = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    done = launch([*words, "--module", "train"], tmp_path, "batch.micro_batch_size=6")
    assert "started by deepspeed, ddp, fp32" in done.stdout
    assert_same_bits(tensors(alone), tensors(tmp_path))


def test_srun(alone, tmp_path):
    """Two tasks with the variables that srun sets."""
    shared = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0",
    }  # fmt: skip
    tasks = [
        Command(
            "fit", *TINY, f"run.dir={tmp_path}", "batch.micro_batch_size=6",
            env={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [task.wait() for task in tasks]
    assert [task.returncode for task in done] == [0, 0], done
    assert "started by srun, ddp" in done[0].stdout
    assert_same_bits(tensors(alone), tensors(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", thinned(["ddp", "fsdp2"], kept=["ddp"]))
def test_torchrun_restarts_what_was_killed(tmp_path, strategy):
    """After a kill -9 of a rank, the restarted group resumes with the same result."""
    base = [f"strategy={strategy}", "checkpoint.every_steps=10", "checkpoint.asynchronous=false"]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--max-restarts", "2", "--master-addr", "127.0.0.1", "--master-port"]
    undisturbed = launch([*words, str(free_port()), "-m", "train"], tmp_path / "one", *base)
    assert "Finished: 40 steps" in undisturbed.stdout
    disturbed = launch(
        [*words, str(free_port()), "-m", "train"], tmp_path / "two", *base, "task.kill_at_step=25"
    )
    assert "resumes at step 20 (attempt 2)" in disturbed.stdout
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert checkpoints(tmp_path / "one") == checkpoints(tmp_path / "two")
    assert "all well" in run("verify", tmp_path / "two").stdout


def test_contradicting_variables_are_an_error(tmp_path):
    environ = {"RANK": "0"}
    words = [sys.executable, "-m", "train"]
    done = launch(words, tmp_path, env=environ, expect=64)
    assert "RANK is set in the environment ('0'), but WORLD_SIZE is not" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.exists(tmp_path / "ledger.bin")
