"""Two containers as two nodes."""

import os
import time
from itertools import count

from tests.support.runs import ROOT, TINY, checkpoints

_number = count()


class Nodes:
    """Containers of the image on a private network, hardened as in docs/docker.md. ``runs`` is the
    directory of the host that they mount as /runs."""

    def __init__(self, docker, image, directory):
        self.docker, self.image = docker, image
        self.name = f"isorun-test-{os.getpid()}-{next(_number)}"
        self.runs = directory / "runs"
        self.runs.mkdir()
        self.runs.chmod(0o1777)  # the user id in the image is a different one
        self.started = []
        docker("network", "create", "--internal", self.name)

    def hardened(self):
        """The options for a hardened container."""
        return [
            "--read-only", "--tmpfs", "/scratch", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--network", self.name,
            "--volume", f"{self.runs}:/runs", "--env", "OMP_NUM_THREADS=1",
        ]  # fmt: skip

    def start(self, name, *command, options=()):
        """Starts a container in the background; others reach it by its name."""
        full = f"{self.name}-{name}"
        self.docker(
            "run", "--detach", "--name", full, "--hostname", name, "--network-alias", name,
            *self.hardened(), *options, self.image, *command,
        )  # fmt: skip
        self.started.append(full)
        return full

    def start_agents(self, run, *overrides, base=TINY, options=(), agent=()):
        """Starts an agent on each of two nodes. Mounts the test task, which the image does not
        contain."""
        return [
            self.start(
                f"node{rank}", "python", "-m", "launch.agent", "--nnodes", "2",
                "--rdzv-endpoint", "node0", "--node-rank", str(rank), *agent,
                "--", "python", "-m", "train", "fit", *base, f"run.dir=/runs/{run}", *overrides,
                options=["--volume", f"{ROOT}/tests:/app/tests:ro", "--shm-size", "256m", *options],
            )
            for rank in range(2)
        ]  # fmt: skip

    def finish(self, names, timeout=300):
        """Waits for containers and removes them; returns their exit codes."""
        codes = [int(self.docker("wait", name, timeout=timeout).stdout) for name in names]
        self.said = "\n".join(f"== {name}\n{self.logs(name)}" for name in names)
        for name in names:
            self.docker("rm", name)
            self.started.remove(name)
        return codes

    def run_agents(self, *args, expect=0, **kwargs):
        """Starts both nodes and waits until they end; returns their output."""
        codes = self.finish(self.start_agents(*args, **kwargs))
        assert codes == [expect, expect], self.said
        return self.said

    def logs(self, name):
        done = self.docker("logs", name)
        return done.stdout + done.stderr

    def wait_for_checkpoint(self, run, names):
        """Waits until the run has a checkpoint; fails at once if a node has ended."""
        deadline = time.monotonic() + 300
        while not (self.runs / run / "checkpoints").exists() or not checkpoints(self.runs / run):
            running = self.docker("ps", "--quiet", "--filter", f"name={self.name}-").stdout.split()
            assert len(running) == len(names), "\n".join(map(self.logs, names))
            assert time.monotonic() < deadline, "\n".join(map(self.logs, names))
            time.sleep(0.1)

    def close(self):
        """Removes all containers and the network."""
        for name in self.started:
            self.docker("rm", "--force", name, check=False)
        self.docker("network", "rm", self.name, check=False)
