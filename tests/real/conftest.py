"""Two hosts, a long run without faults, and the container engine and image of all directories here."""

import pytest

from tests.real.docker.build import Builder, save_image
from tests.real.docker.engine import Engine, UnavailableError, clients, connect
from tests.real.elastic import LONG
from tests.support.hosts import Hosts
from tests.support.runs import run


@pytest.fixture(scope="module")
def hosts():
    made = Hosts()
    yield made
    made.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *LONG, "task.sleep=0")
    return directory


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


@pytest.fixture(scope="session")
def image_file(request):
    """The CPU image as a file, for the nodes of a cluster. It is kept until the project's files
    change, so that most sessions need no engine."""
    return save_image(lambda: (request.getfixturevalue("docker"), request.getfixturevalue("image")))
