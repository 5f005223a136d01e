"""W&B's real client against the tests' own server, and one in this process for what does not depend
on it."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.forked import quick_python
from tests.support.wandb_artifacts import WandbArtifacts
from tests.support.wandb_server import WandbServer
from train.artifacts import fetch


@pytest.fixture(scope="module")
def shared_server():
    pytest.importorskip("wandb")
    with WandbServer() as server:
        yield server


@pytest.fixture
def server(shared_server, monkeypatch, tmp_path_factory):
    """The server, without faults and artifacts; this process's client uses it."""
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in shared_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # without a login
    # W&B's client, which runs in a process of its own, takes seconds to import.
    python, variables = quick_python()
    monkeypatch.setattr(sys, "executable", python)
    for name, value in {**variables, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    shared_server.fault = None
    shared_server.artifacts.all.clear()
    shared_server.artifacts.uses.clear()
    shared_server.operations.clear()
    return shared_server


class LocalClient:
    """Answers as the process of ``train.artifacts.client`` does, without one and without a
    server."""

    def __init__(self, artifact):
        self.artifact, self._answers = artifact, iter([{"started": True}])

    def send(self, **request):
        artifact = self.artifact
        if "name" in request:
            entries = artifact.manifest["contents"].items()
            files = {n: {"size": e.get("size"), "ref": e.get("ref")} for n, e in entries}
            answer = {"name": artifact.name, "type": artifact.type, "metadata": {}, "files": files}
        else:
            for name in request["download"]:
                (Path(request["to"]) / name).write_bytes(artifact.files[name])
            answer = {"done": True}
        self._answers = iter([answer])

    def answer(self, where, growing=None, *, seconds=0.0):
        return next(self._answers)


@pytest.fixture
def artifacts(monkeypatch):
    """A store of artifacts; the newest one is what every name leads to."""
    store = WandbArtifacts()

    @contextmanager
    def started(directory):
        yield LocalClient(store.all[-1])

    monkeypatch.setattr(fetch, "started_client", started)
    return store
