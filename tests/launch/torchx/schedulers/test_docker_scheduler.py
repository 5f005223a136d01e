"""Jobs of ``local_docker``, with an engine that only records its calls."""

import json
import threading
from types import SimpleNamespace

import pytest
from torchx.schedulers.docker_scheduler import DockerScheduler

from launch.history import launch_log
from launch.history.launches import find_launch
from launch.torchx.schedulers import create
from launch.torchx.schedulers.docker_scheduler import _config_files
from tests.launch.launched import said, submit
from tests.launch.launching import dryrun
from tests.support.runs import ROOT, TINY

JOB = "run-x1"


class Container:
    """A container that takes a moment to save when it is stopped, and then exits with 143."""

    def __init__(self, number, *env):
        self.status, self.name, self.timeout = "running", f"{JOB}-{number}", None
        self.image = SimpleNamespace(id="i", tags=["i"])
        self.labels = {
            "torchx.pytorch.org/app-id": JOB,
            "torchx.pytorch.org/role-name": "fit",
            "torchx.pytorch.org/replica-id": str(number),
        }
        self.attrs = {"State": {"ExitCode": 0}, "Config": {"Env": ["PATH=/bin", *env]}}
        self.together = None

    def stop(self, timeout=10):
        self.timeout = timeout
        self.together.wait(10)  # raises unless all containers are stopped at the same time
        self.status, self.attrs["State"]["ExitCode"] = "exited", 143
        create("local_docker", "torchx").describe(JOB)  # as does a process that waits for the job

    def wait(self, timeout):
        return {"StatusCode": self.attrs["State"]["ExitCode"]}


@pytest.fixture
def engine(monkeypatch):
    """The containers of the engine."""
    found = [Container(0), Container(1, "PET_SHUTDOWN_TIMEOUT=100")]
    together = threading.Barrier(len(found))
    for container in found:
        container.together = together

    class Engine:
        class containers:  # noqa: N801
            list = staticmethod(lambda **_: found)

        info = staticmethod(lambda: {"NCPU": 2})

    monkeypatch.setattr(DockerScheduler, "_docker_client", Engine(), raising=False)
    return found


def test_a_cancelled_job_has_time_to_save_and_does_not_count_as_failed(engine, capsys):
    handle, _ = submit(JOB, "local_docker")
    scheduler = create("local_docker", "torchx")
    scheduler.cancel(JOB)
    assert [container.timeout for container in engine] == [45, 110]
    assert scheduler.describe(JOB).state.name == "CANCELLED"
    assert find_launch(JOB).state == "CANCELLED"
    (end,) = [line for line in launch_log.read() if line["event"] == "ended"]
    assert (end["handle"], end["state"]) == (handle, "CANCELLED")
    assert "it was cancelled" in said(capsys, "why", JOB)


def test_a_failed_job_is_reported_as_failed(engine):
    submit(JOB, "local_docker")
    for container in engine:
        container.status, container.attrs["State"]["ExitCode"] = "exited", 75
    assert create("local_docker", "torchx").describe(JOB).state.name == "FAILED"
    assert find_launch(JOB).end["exit_codes"] == [75, 75]


def test_a_job_without_its_containers_has_not_succeeded(engine):
    submit(JOB, "local_docker")
    engine.clear()
    assert create("local_docker", "torchx").describe(JOB) is None
    assert find_launch(JOB).refresh() == "GONE"


def test_docker_does_not_restart_containers_since_it_ignores_exit_codes(engine, capsys):
    info = dryrun("isorun.fit", "-j", "2x1", "--max_retries", "3", *TINY, scheduler="local_docker")
    assert "restart_policy" not in json.dumps([c.kwargs for c in info.request.containers])
    assert "isorun: warning: --max_retries 3 is ignored" in capsys.readouterr().err
    dryrun("isorun.fit", *TINY, scheduler="local_docker")
    assert "warning" not in capsys.readouterr().err


def test_config_files_are_found_however_the_command_names_them():
    for words in (["--config", "/x"], ["--config=/x"], ["optim.lr=1", "--conf", "/x"]):
        agent = ["-m", "launch.agent", "--nnodes", "2", "--", "python", "-m", "train", "fit"]
        assert _config_files([*agent, *words]) == ["/x"]
    assert _config_files(["-m", "launch.agent", "--", "python", "mine.py", "--config", "/x"]) == []


def test_a_config_file_outside_the_mounts_is_reported(engine, capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mounted = ("--mounts", f"type=bind,src={tmp_path},dst={tmp_path},readonly")
    here = "configs/digits.yaml"
    words = [word for word in TINY if not word.startswith("optim.lr=")]
    for component, more in (("fit", []), ("sweep", ["optim.lr=0.1,0.2"])):
        for file, options, warned in (
            (mine, (), True), (mine, mounted, False), (here, (), False), (f"{ROOT}/{here}", (), True),
        ):  # fmt: skip
            dryrun(f"isorun.{component}", "--check", "False", *options, "--config", str(file), *words, *more,
                   scheduler="local_docker")  # fmt: skip
            told = capsys.readouterr().err
            assert (f"warning: The config file {file} is not in a mount" in told) is warned, told
