import pytest

from tests.support.kubectl import kubectl


@pytest.fixture(autouse=True)
def _kubectl(monkeypatch):
    """Rendering in this process finds the kubectl that the tests have; no file of the user's
    says which cluster there is."""
    monkeypatch.setenv("ISORUN_KUSTOMIZE", kubectl())
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
