"""Nothing fails on systems without the functions of Linux.

Other systems are simulated by removing these functions.
"""

import os
import socket
from pathlib import Path

import pytest

import train
from launch.history.launches import Launch
from tests.support.runs import TINY
from train.process.cores import usable_cores


@pytest.fixture
def elsewhere(monkeypatch):
    """Simulates a system without Linux's own functions and without /proc."""
    for module, name in (
        (os, "sched_getaffinity"),
        (os, "posix_fadvise"),
        (os, "POSIX_FADV_DONTNEED"),
        (socket, "TCP_USER_TIMEOUT"),
        (socket, "TCP_KEEPIDLE"),
    ):
        monkeypatch.delattr(module, name)
    for name in ("exists", "is_dir", "read_bytes", "read_text", "iterdir", "open"):
        monkeypatch.setattr(Path, name, _without_proc(getattr(Path, name), name))


def _without_proc(original, name):
    def method(path, *args, **kwargs):
        if not str(path).startswith(("/proc", "/sys")):
            return original(path, *args, **kwargs)
        if name in ("exists", "is_dir"):
            return False
        raise FileNotFoundError(2, "No such file or directory", str(path))

    return method


def test_all_cores_count(elsewhere):
    assert usable_cores() == os.cpu_count()


@pytest.mark.process  # runs git for the version of the code
def test_a_run_is_trained(elsewhere, tmp_path):
    done = train.fit(*TINY, f"run.dir={tmp_path}", "length.steps=6", "track.console=quiet")
    assert done.exit == train.Exit.DONE
    names = done.run.metrics
    assert "train/loss" in names
    assert "memory/rss_gib" not in names


def test_the_doctor_measures_storage_and_reads_limits(elsewhere, monkeypatch, tmp_path):
    from launch.doctor.checks import environment, storage

    monkeypatch.setattr(storage, "PROBE_BYTES", 1 << 20)
    (found,) = storage.speed(train.load_config(*TINY, f"run.dir={tmp_path}"))
    assert "/s read, with 1" in found.text
    assert environment.usable_cores() == os.cpu_count()


def test_connections_are_not_changed(elsewhere):
    from launch.agent.keepalive import set_keepalive

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            set_keepalive(port)
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.mark.parametrize(("command", "state"), [("torchx run", "RUNNING"), ("vim", "LOST")])
def test_a_local_launch_is_found(elsewhere, monkeypatch, command, state):
    """It ends together with the `torchx run` that started it."""
    monkeypatch.setattr("psutil.Process.cmdline", lambda process: command.split())
    line = {"scheduler": "local_cwd", "host": socket.gethostname(), "pid": os.getpid()}
    assert Launch(line).refresh() == state
