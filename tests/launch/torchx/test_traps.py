"""Problematic defaults of TorchX: each test fails without our remedy.

Tests of names and defaults run TorchX's own command outside the repository, without its
``.torchxconfig``.
"""

import argparse
import configparser
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.cli.cmd_run import CmdRun
from torchx.components.dist import ddp
from torchx.specs import macros

from launch.agent.options import parse
from launch.torchx import cli
from launch.torchx.cli import RunCommand
from launch.torchx.schedulers import SCHEDULERS
from tests.launch.launching import NIGHTLY, dryrun, fit
from tests.support.lanes import thinned
from tests.support.runs import ROOT, TINY
from train.exits import UsageError

TORCHX = Path(sys.executable).with_name("torchx")


def torchx(*words, cwd, expect=0, **environ):
    done = subprocess.run(
        [TORCHX, *words], cwd=cwd, env={**os.environ, **environ},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_one_registered_component_would_hide_the_built_in_ones(tmp_path):
    found = set(re.findall(r"\d+\. (\S+)", torchx("builtins", cwd=tmp_path).stdout))
    assert {f"isorun.{name}" for name in ("fit", "doctor", "sweep", "run")} <= found
    assert {"dist.ddp", "dist.spmd", "utils.echo", "utils.sh"} <= found
    assert ("metrics.tensorboard" in found) is not NIGHTLY, "components of TorchX must be unchanged"
    assert not [name for name in found if name.startswith("isorun.") and "_" in name]


def test_one_registered_scheduler_would_hide_the_built_in_ones_and_become_the_default(tmp_path):
    said = torchx("run", "--help", cwd=tmp_path).stdout
    listed = re.search(r"-s \{([^}]+)\}", re.sub(r"\s+", "", said).replace("-s{", "-s {"))[1]
    assert set(listed.split(",")) == set(SCHEDULERS)
    # Without configuration the default is the local scheduler.
    done = torchx("run", "--dryrun", "utils.echo", "--msg", "hi", cwd=tmp_path)
    assert "role_params" in done.stdout, "the default must be a local scheduler"


def test_a_configured_default_scheduler_is_respected(tmp_path):
    (tmp_path / ".torchxconfig").write_text("[cli:run]\nscheduler = slurm\n")
    done = torchx("run", "--dryrun", "utils.echo", "--msg", "hi", cwd=tmp_path)
    assert "#SBATCH" in done.stdout


def test_the_project_s_configuration_names_a_local_scheduler_and_builds_nothing():
    config = configparser.ConfigParser()
    config.read(ROOT / ".torchxconfig")
    assert config["cli:run"]["scheduler"] == "local_cwd"
    assert config["cli:run"]["workspace"] == ""
    assert set(config.sections()) - {"cli:run"} <= set(SCHEDULERS)


def test_runopts_would_end_in_a_traceback_without_ray(tmp_path):
    done = torchx("runopts", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert "The scheduler ray is not available" in done.stdout
    assert "slurm" in done.stdout


def test_an_unavailable_scheduler_is_reported_in_one_sentence(tmp_path):
    done = torchx("run", "-s", "ray", "--dryrun", "utils.echo", cwd=tmp_path, expect=64)
    assert done.stderr.strip().splitlines()[-1].startswith("isorun: error: The scheduler ray")
    assert "Traceback" not in done.stderr


@pytest.mark.normal
@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm"])
def test_a_job_without_image_never_runs_a_train_py_of_the_working_directory(
    monkeypatch, tmp_path, scheduler
):
    monkeypatch.chdir(tmp_path)
    assert fit(scheduler=scheduler).args[:3] == ["-P", "-m", "launch.agent"]
    monkeypatch.chdir(ROOT)  # the source directory, since isorun may not be installed
    assert fit(scheduler=scheduler).args[:2] == ["-m", "launch.agent"]


def test_a_job_in_an_image_never_runs_a_launch_py_of_the_working_directory(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert fit(scheduler="local_docker").args[:3] == ["-P", "-m", "launch.agent"]


def test_a_closed_terminal_stops_a_local_job_as_sigterm_does(monkeypatch):
    """TorchX handles SIGTERM and SIGINT only, and the nodes do not belong to the terminal."""

    def submit_and_wait(*_):
        assert callable(signal.getsignal(signal.SIGHUP)), "the signal would end this process"
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)  # must not end the wait for the nodes

    monkeypatch.setattr(CmdRun, "run", submit_and_wait)
    monkeypatch.setattr(cli, "_check", lambda _: None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.raises(SystemExit) as caught:
        RunCommand().run(argparse.Namespace())
    assert caught.value.code == 128 + signal.SIGHUP


def test_a_command_that_nohup_started_outlives_its_terminal(monkeypatch):
    monkeypatch.setattr(cli, "_check", lambda _: None)
    monkeypatch.setattr(CmdRun, "run", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    RunCommand().run(argparse.Namespace())


def test_a_missing_rendezvous_variable_would_become_localhost():
    """As in TorchX's own component, where two nodes would run two independent runs."""
    theirs = ddp("x", script="x.py", j="2x1", h=None).roles[0]
    assert ":=localhost" in theirs.args[1]
    ours = fit("-j", "2x1")
    assert "localhost" not in " ".join(ours.args)
    words = [macros.Values("", "id", "1", "NODE0").substitute(word) for word in ours.args]
    with pytest.raises(UsageError, match="NODE0"):
        parse(words[2:], {})
    assert parse(words[2:], {"NODE0": "first"}).host == "first"


def test_two_nodes_on_one_machine_use_their_own_port_and_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("train.process.cores.usable_cores", lambda: 8.0)
    requests = [dryrun("isorun.fit", "-j", "2x2", *TINY).request for _ in range(2)]
    nodes = [request.role_params["fit"] for request in requests]
    ports = [{node.env["PET_RDZV_PORT"] for node in pair} for pair in nodes]
    assert [len(pair) for pair in ports] == [1, 1]
    assert ports[0] != ports[1]
    assert {node.env["OMP_NUM_THREADS"] for pair in nodes for node in pair} == {"2"}
    assert [node.args[node.args.index("--node-rank") + 1] for node in nodes[0]] == ["0", "1"]


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (("isorun.fit", "-j", "1xauto"), None),
        (("isorun.fit", "-j", "1x4"), None),
        (("isorun.fit", "-j", "2xauto"), "4"),
        (("isorun.fit", "-j", "2xauto", "GPUs"), "1"),
        (("isorun.sweep", "-j", "1x8", "run.seed=1,2"), None),
        (("isorun.sweep", "-j", "2x4", "run.seed=1,2"), "8"),
    ],
)
def test_threads_are_left_to_the_agent_unless_nodes_share_the_machine(monkeypatch, words, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7" if "GPUs" in words else "")
    cores = 64 if "isorun.sweep" in words else 8 * (1 + ("GPUs" in words))
    monkeypatch.setattr("train.process.cores.usable_cores", lambda: float(cores))
    component, j, shape, *more = (word for word in words if word != "GPUs")
    request = dryrun(component, j, shape, *TINY, *more).request
    (nodes,) = request.role_params.values()
    assert {node.env.get("OMP_NUM_THREADS") for node in nodes} == {threads}


def test_a_requested_port_is_used():
    (node,) = set(map(tuple, (n.args for n in dryrun(
        "isorun.fit", "-j", "2x1", "--rdzv_port", "4321", *TINY
    ).request.role_params["fit"][:1])))  # fmt: skip
    assert node[node.index("--rdzv-port") + 1] == "4321"


def test_gpus_are_not_counted_without_nvidia_smi(monkeypatch, tmp_path):
    """TorchX runs nvidia-smi without a check and raises FileNotFoundError."""
    monkeypatch.setenv("PATH", str(tmp_path))
    info = dryrun("isorun.fit", "-h", "gpu_t4_2", *TINY, auto_set_cuda_visible_devices=True)
    assert len(info.request.role_params["fit"]) == 1


@pytest.mark.normal
def test_ranks_use_the_python_of_torchx_even_if_its_environment_is_not_active(monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    for scheduler in ("local_cwd", "slurm"):
        info = dryrun("isorun.fit", *TINY, scheduler=scheduler)
        env = (
            info.request.role_params["fit"][0].env
            if scheduler == "local_cwd"
            else next(iter(info.request.replicas.values())).env
        )
        assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_comma_in_a_variable_for_slurm_is_refused():
    with pytest.raises(UsageError, match=r"LIST is '1,2' in the environment of the job, but Slurm"):
        dryrun("isorun.fit", "--env", "LIST=1,2,B=3", *TINY, scheduler="slurm")
    dryrun("isorun.fit", "--env", "LIST=1,2,B=3", *TINY, scheduler="local_cwd")


@pytest.mark.normal
def test_the_nodes_of_a_slurm_job_get_the_host_of_node_0():
    script = repr(dryrun("isorun.fit", "-j", "2x1", *TINY, scheduler="slurm").request)
    assert script.count("--rdzv-host-env SLURM_JOB_NODELIST_HET_GROUP_0") == 2
    assert re.findall(r"--node-rank (\d)", script) == ["0", "1"]


@pytest.mark.parametrize(
    ("code", "requeued"),
    thinned(
        [(0, False), (64, False), (65, False), (70, False), (76, False), (78, False), (130, False),
         (75, True), (137, True), (143, True)],
        kept=[(64, False), (75, True), (137, True)],
    ),
)  # fmt: skip
def test_a_slurm_job_is_requeued_only_after_failures_worth_a_retry(tmp_path, code, requeued):
    """TorchX's batch script with a replaced srun; without our change it requeues after any exit
    code."""
    info = dryrun("isorun.fit", "--max_retries", "1", *TINY, scheduler="slurm")
    for name, text in (
        ("srun", f"exit {code}"),
        ("scontrol", f"[ $1 != requeue ] || echo $@ >> {tmp_path}/said"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "script").write_text(info.request.materialize())
    environ = {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}", "SLURM_JOB_ID": "7"}
    environ["PYTHONPATH"] = str(ROOT)
    script = ["bash", tmp_path / "script"]
    done = subprocess.run(script, env=environ, cwd=tmp_path, capture_output=True)
    assert done.returncode == code
    assert (tmp_path / "said").exists() is requeued
    environ["SLURM_RESTART_COUNT"] = "1"
    (tmp_path / "said").unlink(missing_ok=True)
    subprocess.run(script, env=environ, cwd=tmp_path, capture_output=True)
    # At most as often as configured; a stop on request does not count as a failure.
    assert (tmp_path / "said").exists() is (code == 143)


@pytest.mark.slow
def test_the_project_s_configuration_passes_wandb_s_credentials_to_local_containers():
    done = torchx("run", "-s", "local_docker", "--dryrun", "isorun.fit", *TINY, cwd=ROOT,
                  WANDB_BASE_URL="http://here")  # fmt: skip
    assert "WANDB_BASE_URL: http://here" in done.stdout


def test_containers_do_not_request_more_cores_than_exist(monkeypatch):
    from torchx.schedulers.docker_scheduler import DockerScheduler

    class Engine:
        def info(self):
            return {"NCPU": 2}

    monkeypatch.setattr(DockerScheduler, "_docker_client", Engine(), raising=False)
    info = dryrun("isorun.fit", "-h", "cpu_large", *TINY, scheduler="local_docker")
    assert info.request.containers[0].kwargs["nano_cpus"] == 2e9


def test_an_error_is_one_sentence_with_its_exit_code(tmp_path):
    done = torchx(
        "run", "-s", "slurm", "isorun.fit", "-j", "2x1", *TINY, "optim.lrr=3e-4",
        cwd=tmp_path, expect=64,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if not line.startswith("torchx")]
    assert told == [
        "isorun: error: optim.lrr is not a known key (value 0.0003, from command line); "
        "did you mean optim.lr?"
    ]


@pytest.mark.slow
def test_help_describes_every_argument(tmp_path):
    for name in ("fit", "doctor", "sweep", "run"):
        said = torchx("run", f"isorun.{name}", "--help", cwd=tmp_path).stdout
        described = re.sub(r"\s+", " ", said)
        flags = set(re.findall(r"--(\w+) (?:int|str)\b", said)) - {"help"}
        assert {"config", "j", "h", "memMB"} - ({"config"} if name == "run" else set()) <= flags
        for flag in flags:
            assert re.search(rf"--{flag} (?:int|str) \w[^-]{{10,}}", described), (name, flag)
