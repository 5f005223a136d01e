"""One engine and one image for all tests of this directory."""

import pytest

from tests.real.docker.build import Builder
from tests.real.docker.engine import Engine, UnavailableError, clients, connect
from tests.real.docker.nodes import Nodes


@pytest.fixture(scope="session")
def docker():
    """The client of a working engine."""
    candidates = clients()
    if not candidates:
        pytest.skip("no docker client is installed")
    engine = None
    try:
        found = connect(candidates)
        if found is None:
            engine = Engine(candidates)
            found = engine.docker
    except UnavailableError as error:
        pytest.skip(str(error))
    yield found
    if engine:
        engine.close()


@pytest.fixture(scope="session")
def builder(docker, tmp_path_factory):
    """A builder with all inputs of the project's Dockerfile."""
    try:
        return Builder(docker, tmp_path_factory.mktemp("build"))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def image(builder):
    """The CPU image."""
    builder.build("isorun-test:cpu")
    return "isorun-test:cpu"


@pytest.fixture
def nodes(docker, image, tmp_path):
    """Containers on a separate network that share a run directory."""
    made = Nodes(docker, image, tmp_path)
    yield made
    made.close()
