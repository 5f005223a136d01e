import pytest

from tests.support.kubectl import kubectl
from tests.support.object_store import bucket

__all__ = ["bucket"]


@pytest.fixture(autouse=True)
def _kubectl(monkeypatch):
    """Rendering in this process uses the kubectl of the tests, and no kubeconfig of the user."""
    monkeypatch.setenv("ISORUN_KUSTOMIZE", kubectl())
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
