"""The schedulers as TorchX creates them."""

from importlib.util import find_spec

import pytest
from torchx.schedulers.docker_scheduler import DockerScheduler
from torchx.schedulers.local_scheduler import LocalScheduler
from torchx.schedulers.slurm_scheduler import SlurmScheduler
from torchx.workspace import WorkspaceMixin

from launch.torchx import schedulers
from launch.torchx.schedulers import SCHEDULERS, NotInstalledError, create
from launch.torchx.schedulers.watched import Watched

NEED_MORE = {"ray", "gcp_batch", "aws_sagemaker"}  # they need more packages
# TorchX's nightly has removed some.
USABLE = sorted(
    name for name, (module, _) in SCHEDULERS.items() if name not in NEED_MORE and find_spec(module)
)


@pytest.mark.parametrize("name", USABLE)
def test_every_scheduler_is_watched_and_has_its_name(name):
    scheduler = create(name, "session")
    assert isinstance(scheduler, Watched)
    assert scheduler.handle("job") == f"{name}://session/job"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("local_cwd", LocalScheduler), ("local_docker", DockerScheduler), ("slurm", SlurmScheduler)],
)
def test_torchx_sees_its_own_class(name, kind):
    assert isinstance(create(name, "session"), kind)


def test_torchx_sees_what_a_scheduler_supports():
    assert isinstance(create("kubernetes", "session"), WorkspaceMixin)
    assert not isinstance(create("kubernetes_job", "session"), WorkspaceMixin)


def test_each_scheduler_ignores_parameters_of_others():
    parameters = {"cache_size": 0, "client": object(), "unknown": 1}
    create("slurm", "session", **parameters)
    create("kubernetes_job", "session", **parameters)
    with pytest.raises(ValueError, match="cache size"):
        create("local_cwd", "session", **parameters)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_entry_point_stays_a_factory_after_all_modules_were_imported(name):
    """Importing a module with the name of a scheduler would replace the factory."""
    create("local_docker", "session")
    create("slurm", "session")
    assert callable(getattr(schedulers, name))


def test_a_missing_package_is_reported():
    with pytest.raises(NotInstalledError, match="The scheduler ray is not available: .*install"):
        create("ray", "session")
