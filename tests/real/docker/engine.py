"""A Docker engine for the tests: the running one, or a separate one.

The separate engine does not change the machine's firewall and creates no networks except those that
a test requests. When the tests end, it is stopped and all its data is removed.
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
    """The reason why no engine can be used."""


class Docker:
    """The Docker client. ``docker("run", ...)`` runs a command; if it fails, the error contains its
    output."""

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
        """Imports an image that contains only a directory's files."""
        tar = subprocess.Popen(["tar", "-C", directory, "-c", "."], stdout=subprocess.PIPE)
        self("import", "-", tag, stdin=tar.stdout)
        assert tar.wait() == 0


def clients():
    """All Docker clients in PATH: the first one may lack plugins that the engine's package
    installs."""
    folders = [*os.get_exec_path(), "/usr/bin"]
    found = [shutil.which("docker", path=folder) for folder in folders]
    return list(dict.fromkeys(filter(None, found)))


def connect(candidates, host=None):
    """A client that reaches the engine and can build with BuildKit; None if none reaches it.
    Raises UnavailableError if one reaches it but none can build."""
    reaching = [docker for docker in (Docker(client, host) for client in candidates)
                if docker.works("version")]  # fmt: skip
    for docker in reaching:
        # Only a build shows whether BuildKit works; a minimal one is fast.
        if docker.works("build", "--quiet", "-", input="FROM scratch\nLABEL isorun.test=1\n"):
            return docker
    if reaching:
        raise UnavailableError(
            f"the Docker engine responds, but none of {', '.join(candidates)} can build with "
            "BuildKit; install docker-buildx, or the engine's own client"
        )
    return None


class Engine:
    """A ``dockerd`` in a temporary directory; ``docker`` is its client."""

    def __init__(self, candidates):
        daemon = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin")
        if daemon is None:
            raise UnavailableError("no Docker engine responds, and dockerd is not installed")
        if os.geteuid() != 0:
            raise UnavailableError("no Docker engine responds, and only root can start one")
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
        raise UnavailableError(f"dockerd does not start: {' | '.join(last)}")

    def close(self):
        """Stops the engine and removes its data."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def git(*words):
    """The output of git in the project; empty if it is not a repository."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
