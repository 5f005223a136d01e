"""``torchx run -s local_docker``: two containers that TorchX starts, and their launch log."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import ROOT, checkpoints, curve, environment, run

# The first test waits until the image is built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TORCHX = str(Path(sys.executable).with_name("torchx"))
NAMED = "label=torchx.pytorch.org/app-id"
DIGITS = [
    "length.epochs=null", "length.steps=60", "evaluate.every_epochs=null", "run.name=two",
    "checkpoint.every_steps=10", "checkpoint.asynchronous=false", "track.log_every_steps=1",
    "track.wandb=disabled", "track.tensorboard=false", "batch.micro_batch_size=32",
]  # fmt: skip


class User:
    """A user who submits jobs; ``runs`` is mounted as /runs in the containers."""

    def __init__(self, docker, image, directory):
        self.docker = docker
        # By id, because TorchX looks for names in a registry first.
        self.image = docker("inspect", "--format", "{{.Id}}", image).stdout.strip()
        self.runs = directory / "runs"
        self.runs.mkdir()
        self.runs.chmod(0o1777)
        self.environment = environment() | docker.environment
        self.environment["XDG_STATE_HOME"] = str(directory / "state")
        self.networks = self._names("network", "ls", "--filter", "name=torchx", "-q")
        self.before = self._names("ps", "-aq", "--filter", NAMED)

    def _names(self, *words):
        return set(self.docker(*words).stdout.split())

    def start(self, *overrides):
        return subprocess.Popen(
            [TORCHX, "run", "-s", "local_docker", "isorun.fit", "-j", "2x1", "--image", self.image,
             "--memMB", "2048", "--env", "OMP_NUM_THREADS=1",
             "--mounts", f"type=bind,src={self.runs},dst=/runs", "--config", "configs/digits.yaml",
             *DIGITS, *overrides],
            cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def containers(self):
        """The ids of the containers of this user's jobs, running or ended."""
        return self._names("ps", "-aq", "--filter", NAMED) - self.before

    def exit_codes(self):
        inspected = (
            self.docker("inspect", "-f", "{{.State.ExitCode}}", c) for c in self.containers()
        )
        return sorted(int(done.stdout) for done in inspected)

    def ledger(self):
        path = Path(self.environment["XDG_STATE_HOME"]) / "isorun" / "launches.jsonl"
        return [json.loads(line) for line in path.open()]

    def clear(self):
        for container in self.containers():
            self.docker("rm", "--force", container, check=False)

    def close(self):
        self.clear()
        for network in (
            self._names("network", "ls", "--filter", "name=torchx", "-q") - self.networks
        ):
            self.docker("network", "rm", network, check=False)


@pytest.fixture
def user(docker, image, tmp_path):
    pytest.importorskip("torchx")
    made = User(docker, image, tmp_path)
    yield made
    made.close()


def ended(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out + err


def test_two_containers_train_and_resume_after_one_was_killed(docker, user):
    process = user.start()
    deadline = time.monotonic() + 300
    while not (user.runs / "two/checkpoints").exists() or not checkpoints(user.runs / "two"):
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline, [docker("logs", c).stderr for c in user.containers()]
        time.sleep(0.1)
    assert len(user.containers()) == 2
    addresses = {
        docker(
            "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", c
        ).stdout
        for c in user.containers()
    }
    assert len(addresses) == 2, "each container must have its own address"
    names = {docker("inspect", "-f", "{{.Name}}", c).stdout.strip(): c for c in user.containers()}
    docker("kill", next(c for name, c in names.items() if name.endswith("-1")))
    code, said = ended(process)
    assert code != 0, said
    assert user.exit_codes() == [75, 137], said
    assert user.ledger()[-1]["state"] == "FAILED"
    user.clear()

    code, said = ended(user.start())
    assert code == 0, said
    assert user.exit_codes() == [0, 0]
    assert user.ledger()[-1]["exit_codes"] == [0, 0]
    first = user.ledger()[0]
    identity = json.loads((user.runs / "two" / "run.json").read_text())
    assert identity["id"] == first["run_id"], "the id must be that of the first launch"

    base = ["--config", "configs/digits.yaml", *DIGITS]
    assert "all well" in run("verify", user.runs / "two", base=base).stdout
    run("fit", user.runs / "host", base=base)
    expected = curve(user.runs / "host")
    assert len(expected) == 60
    assert curve(user.runs / "two") == pytest.approx(expected, abs=1e-5)
