"""One Slurm for all tests of this directory, and its jobs."""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.real.slurm.cluster import Cluster, why_not
from tests.support.runs import ROOT, TINY, checkpoints, environment, metrics

SBATCH = "configs/slurm/fit.sbatch"
PATIENCE = 300.0  # seconds until a job makes progress, on a busy machine
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def wait_until(condition, what=lambda: ""):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out\n{what()}"
        time.sleep(0.1)


class User:
    """A user of the cluster."""

    def __init__(self, cluster, home):
        self.cluster, self.home, self.jobs = cluster, Path(home), []
        python = str(Path(sys.executable).parent)
        self.environment = {
            **environment(), **cluster.environment, "HOME": str(home),
            "XDG_STATE_HOME": f"{home}/state", "PYTHONPATH": str(ROOT),
            "PATH": f"{python}:{cluster.environment['PATH']}",
            "PET_PREFLIGHT": "off",  # it takes as long as these runs; only one test turns it on
        }  # fmt: skip

    def run(self, *command, **kwargs):
        """Runs a command to its end."""
        return self.cluster.run(
            *command, **{"env": self.environment, "cwd": ROOT, "timeout": PATIENCE, **kwargs}
        )

    def sbatch(self, *words):
        done = self.run("sbatch", "--parsable", f"--output={self.home}/%j.out", *words)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return Job(self, self.jobs[-1])

    def fit(self, directory, *overrides, options=()):
        """Submits the project's batch file."""
        return self.sbatch(*options, SBATCH, *TINY, f"run.dir={directory}", *overrides)


class Job:
    """A job in the queue."""

    def __init__(self, user, number):
        self.user, self.number = user, number

    @property
    def facts(self):
        """The fields of `scontrol show job`; of the last component of a heterogeneous job."""
        return dict(re.findall(r"(\w+)=(\S*)", self._show()))

    @property
    def states(self):
        """The state of each component."""
        return re.findall(r"JobState=(\S*)", self._show())

    def _show(self):
        return self.user.cluster.tool("scontrol", "--oneliner", "show", "job", self.number)

    @property
    def log(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.user.home / f"{self.number}.out").read_text()
        return ""

    @property
    def restarts(self):
        return int(self.facts["Restarts"])

    def wait_for(self, condition):
        wait_until(condition, lambda: f"{self.facts}\n{self.log}")

    def end(self):
        """Waits for the end of all components of the job; returns the state and the exit code of
        the last."""
        self.wait_for(lambda: (states := self.states) and set(states) <= set(OVER))
        facts = self.facts
        return facts["JobState"], int(facts["ExitCode"].split(":")[0])

    def trains(self, directory):
        """Waits until the run has taken a step."""
        file = Path(directory) / "metrics.jsonl"
        self.wait_for(lambda: file.exists() and metrics(directory))

    def saved(self, directory):
        """Waits until a checkpoint is committed."""
        self.wait_for(lambda: checkpoints(directory))


def attempts(directory):
    return [json.loads(line) for line in (Path(directory) / "attempts.jsonl").open()]


@pytest.fixture(scope="session")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    # Not in pytest's directory, because paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory:
        os.chmod(directory, 0o755)
        made = Cluster(directory)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def user(cluster, tmp_path):
    user = User(cluster, tmp_path)
    yield user
    cluster.empty()
    for number in user.jobs:  # not those of a cluster beside this one
        (ROOT / f"isorun-{number}.failures").unlink(missing_ok=True)  # in the directory of sbatch
