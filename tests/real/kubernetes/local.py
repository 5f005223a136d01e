"""A cluster on this machine: upstream Kubernetes from a directory beside the repository, or from the
one that ISORUN_TEST_KUBERNETES names. Its nodes are network namespaces with a containerd and a
kubelet each, so a directory of this machine is the same on all of them.
"""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.support.runs import ROOT

STATE = Path(os.environ.get("KUBERNETES_STATE", "/tmp/isorun-kubernetes"))
NODES = 2
ADD_ONS = ("jobset", "kueue", "trainer", "volcano-types")
HOST = "10.99.0.1"  # this machine, as the nodes and the pods reach it
PACKAGES = {
    "containerd": "containerd", "runc": "runc", "iptables": "iptables", "conntrack": "conntrack",
    "ip": "iproute2", "openssl": "openssl", "/usr/lib/cni/bridge": "containernetworking-plugins",
}  # fmt: skip
# A busy machine delays the heartbeats of the kubelets.
GRACE = 20  # seconds after which a silent node is NotReady


def program():
    """The command that starts and stops the cluster; it may not exist."""
    place = os.environ.get("ISORUN_TEST_KUBERNETES")
    return (Path(place) if place else ROOT.parent / "shared" / "kubernetes") / "cluster"


def unavailable():
    """Why no cluster can be started here; None if one can."""
    if not program().is_file():
        return (
            f"KUBECONFIG is not set, and there is no {program()} to start a cluster with "
            "(ISORUN_TEST_KUBERNETES names its directory)"
        )
    if os.geteuid() != 0:
        return "only root can start a cluster"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = sorted({package for name, package in PACKAGES.items()
                      if not shutil.which(name, path=path)})  # fmt: skip
    return f"these Debian packages are not installed: {' '.join(missing)}" if missing else None


class LocalCluster:
    """The cluster. ``owned``: it was started here, so that it ends here."""

    def __init__(self, *, owned):
        self.owned, self.kubeconfig = owned, STATE / "admin.conf"

    @classmethod
    def start(cls, image_file):
        """Starts a cluster with all controllers, whose nodes have an image. Raises RuntimeError if
        another session's is running: there is one per machine."""
        owner = _owner()
        if STATE.exists() and owner != os.getpid():
            if owner is not None or not _OWNER.exists():
                whose = f"process {owner}" if owner else "no test"
                raise RuntimeError(
                    f"{whose} has started the cluster in {STATE}, and there is one per machine; "
                    f"use it (KUBECONFIG={STATE}/admin.conf, ISORUN_TEST_IMAGE), or end it with "
                    f"`{program()} down`"
                )
            cls(owned=True).close()  # an interrupted session has left it
        made = cls(owned=True)
        STATE.mkdir(parents=True, exist_ok=True)
        _OWNER.write_text(str(os.getpid()))
        try:
            made("up", "--nodes", str(NODES))
            with ThreadPoolExecutor() as pool:  # the one computes, the other waits
                parts = [
                    pool.submit(made, "load", str(image_file)),
                    pool.submit(made.add, *ADD_ONS),
                ]
            for part in parts:
                part.result()
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def find(cls, kubeconfig):
        """The running cluster if the kubeconfig is its own, else None."""
        same = program().is_file() and Path(kubeconfig) == STATE / "admin.conf"
        return cls(owned=False) if same else None

    def __call__(self, *words):
        """Runs a command such as ``cut node1``; returns its output."""
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        done = subprocess.run(
            [sys.executable, program(), *words], capture_output=True, text=True, timeout=1500,
            env={**os.environ, "PATH": path, "KUBERNETES_NODE_GRACE": str(GRACE)},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"cluster {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add(self, *names):
        """Installs controllers, unless they are there."""
        for name in names:
            if not (marker := STATE / f"has-{name}").exists():
                self("add", name)
                marker.touch()

    def kill(self, name):
        """Ends a program of the cluster, such as apiserver, by SIGKILL, if it runs."""
        with suppress(OSError, ValueError, IndexError):
            pid, born = (STATE / f"{name}.pid").read_text().split()
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if stat[19] == born:  # else another process has its number
                os.kill(int(pid), signal.SIGKILL)

    def close(self):
        """Ends the cluster if it was started here."""
        if not self.owned:
            return
        for file in STATE.glob("*.pid"):  # their order does not matter, since nothing is kept
            if not file.name.startswith("containerd"):  # it ends the pods
                self.kill(file.stem)
        self("down")


_OWNER = STATE / "started-by-tests"


def _owner():
    """The process of the tests that has started the cluster, if it is alive."""
    with suppress(OSError, ValueError):
        pid = int(_OWNER.read_text())
        os.kill(pid, 0)
        return pid
    return None
