"""Two hosts, and a long run without faults."""

import pytest

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
