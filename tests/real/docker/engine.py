"""A Docker engine for the tests: the one that answers, or one of their own.

Their own engine has no business with the machine's firewall and makes no network but those that
a test asks for; when the tests end it is gone, and all that was in it.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.runs import ROOT


class UnavailableError(Exception):
    """Why there is no engine, in words."""


class Docker:
    """The client; ``docker("run", ...)`` is the command, and raises what it said if it fails."""

    def __init__(self, client, host=None):
        self.client = client
        self.own = host is not None
        self.environment = os.environ | {"DOCKER_BUILDKIT": "1"}
        if host:
            self.environment["DOCKER_HOST"] = host

    def __call__(self, *words, check=True, timeout=600, **kwargs):
        done = subprocess.run(
            [self.client, *map(str, words)], env=self.environment, capture_output=True, text=True,
            timeout=timeout, **kwargs,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(
                f"docker {' '.join(map(str, words))}: exit {done.returncode}\n"
                f"{done.stdout}\n{done.stderr}"
            )
        return done

    def works(self, *words, **kwargs):
        """Whether a command succeeds."""
        return self(*words, check=False, **kwargs).returncode == 0

    def import_directory(self, directory, tag):
        """An image that holds a directory's files and nothing else."""
        tar = subprocess.Popen(["tar", "-C", directory, "-c", "."], stdout=subprocess.PIPE)
        self("import", "-", tag, stdin=tar.stdout)
        assert tar.wait() == 0


def clients():
    """All clients there are: the first may lack what the engine's own package brings."""
    folders = [*os.get_exec_path(), "/usr/bin"]
    found = [shutil.which("docker", path=folder) for folder in folders]
    return list(dict.fromkeys(filter(None, found)))


def connect(candidates, host=None):
    """A client that reaches the engine and can build with BuildKit; None if none reaches it.
    Raises UnavailableError if one reaches it but none can build."""
    reaching = [docker for docker in (Docker(client, host) for client in candidates)
                if docker.works("version")]  # fmt: skip
    for docker in reaching:
        # Only a real build tells; the smallest there is takes a moment.
        if docker.works("build", "--quiet", "-", input="FROM scratch\nLABEL isorun.test=1\n"):
            return docker
    if reaching:
        raise UnavailableError(
            f"the Docker engine answers, but no client of {', '.join(candidates)} can build with "
            "BuildKit; install docker-buildx, or the engine's own client"
        )
    return None


class Engine:
    """Their own ``dockerd``, in a temporary directory; ``docker`` is the client to use."""

    def __init__(self, candidates):
        daemon = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin")
        if daemon is None:
            raise UnavailableError("no Docker engine answers, and there is no dockerd to start")
        if os.geteuid() != 0:
            raise UnavailableError("no Docker engine answers, and only root can start one")
        self.directory = Path(tempfile.mkdtemp(prefix="isorun-docker-"))
        host = f"unix://{self.directory}/socket"
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [daemon, "--storage-driver", "overlay2", "--host", host,
                 "--data-root", self.directory / "data", "--exec-root", self.directory / "exec",
                 "--pidfile", self.directory / "pid", "--bridge", "none", "--iptables=false",
                 "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self.docker = self._wait(candidates, host)
        except UnavailableError:
            self.close()
            raise

    def _wait(self, candidates, host):
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            if docker := connect(candidates, host):
                return docker
            time.sleep(0.3)
        last = (self.directory / "log").read_text(errors="replace").splitlines()[-3:]
        raise UnavailableError(f"dockerd does not start here: {' | '.join(last)}")

    def close(self):
        """Ends it, and removes all that it had."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def git(*words):
    """What git says of the project; empty where it is no repository."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
