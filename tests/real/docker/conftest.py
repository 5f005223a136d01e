"""Two containers as nodes; tests/real/conftest.py has the engine and the image."""

import pytest

from tests.real.docker.nodes import Nodes


@pytest.fixture
def nodes(docker, image, tmp_path):
    """Containers on a separate network that share a run directory."""
    made = Nodes(docker, image, tmp_path)
    yield made
    made.close()
