"""W&B's real client against the tests' own server."""

import pytest

from tests.support.wandb_server import WandbServer


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
    shared_server.fault = None
    shared_server.artifacts.all.clear()
    shared_server.artifacts.uses.clear()
    shared_server.operations.clear()
    return shared_server
