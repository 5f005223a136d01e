"""docker/compose.yaml: one command trains on two nodes."""

import os
import shutil
import subprocess

import pytest

from tests.support.runs import ROOT

# The first test waits until the image is built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def compose(docker, image):
    """The command `docker compose` or `docker-compose`, with a separate project name."""
    if docker.works("compose", "version"):
        command = [docker.client, "compose"]
    elif shutil.which("docker-compose"):
        command = ["docker-compose"]
    else:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    project = f"isorun-test-{os.getpid()}"
    environment = docker.environment | {"ISORUN_IMAGE": image}

    def call(*words, **variables):
        return subprocess.run(
            [*command, "-f", "docker/compose.yaml", "-p", project, *words],
            cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=500,
        )  # fmt: skip

    call.volume = f"{project}_runs"
    yield call
    call("down", "--volumes", "--timeout", "1")


def test_one_command_trains_text_on_both_nodes(docker, image, compose):
    arguments = (
        "--config configs/text.yaml length.steps=6 schedule.warmup_steps=2 evaluate.at_end=false "
        "evaluate.every_steps=null track.log_every_steps=1"
    )
    done = compose("up", ISORUN_ARGS=arguments)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "2 x cpu" in said
    assert "Finished: 6 steps" in said
    assert said.count("exited with code 0") == 2, said
    # The text is that of the Python in the image, so verify runs there.
    verified = docker(
        "run", "--rm", "--network", "none", "--volume", f"{compose.volume}:/runs", image,
        "python", "-m", "train", "verify", *arguments.split(),
    )  # fmt: skip
    assert "all well" in verified.stdout
