import pytest

from launch.kubernetes import helper_pod, logs
from tests.support.api_server import Server
from tests.support.cluster import Cluster
from tests.support.kubectl import kubectl
from tests.support.object_store import bucket

__all__ = ["bucket"]


@pytest.fixture(autouse=True)
def _kubectl(monkeypatch):
    """Rendering in this process uses the kubectl of the tests, and no kubeconfig of the user."""
    monkeypatch.setenv("ISORUN_KUSTOMIZE", kubectl())
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The small Kubernetes, to which KUBECONFIG leads."""
    made = Cluster()
    with Server(made, tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        for module in (helper_pod, logs):
            monkeypatch.setattr(module, "_POLL", 0.01)
        yield made
