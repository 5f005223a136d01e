"""Two hosts made of network namespaces that a veth pair connects."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import count

from tests.support.runs import ROOT, TINY, environment

_number = count()


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not():
    if shutil.which("ip") is None:
        return "`ip` is not installed (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"isorun-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be created ({error.stderr.strip()})"
    return None


class Hosts:
    """Two namespaces; ``start`` runs a command with one rank on each."""

    def __init__(self):
        number = next(_number)  # several test processes may create hosts at the same time
        self.subnet = f"10.213.{number % 256}"
        self.names = [f"isorun-{os.getpid()}-{number}{side}" for side in "ab"]
        self.cables = [f"iso{os.getpid() % 100000}n{number}{side}" for side in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{self.subnet}.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def close(self):
        for name in self.names:
            ip("netns", "del", name)  # deletes its end of the veth pair as well

    def cut(self, host=0):
        ip("-n", self.names[host], "link", "set", self.cables[host], "down")

    def mend(self, host=0):
        ip("-n", self.names[host], "link", "set", self.cables[host], "up")

    def start(self, directory, *overrides, base=TINY):
        shared = {
            "MASTER_ADDR": f"{self.subnet}.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2",
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        }  # fmt: skip
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "train", "fit",
                 *base, f"run.dir={directory}", *overrides],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**environment(), **shared, "RANK": str(rank),
                     "GLOO_SOCKET_IFNAME": self.cables[rank]},
            )
            for rank in range(2)
        ]  # fmt: skip

    def run(self, directory, *overrides, base=TINY, expect=0):
        done = [
            (*rank.communicate(timeout=300), rank.returncode)
            for rank in self.start(directory, *overrides, base=base)
        ]
        assert [code for *_, code in done] == [expect, expect], done
        return done

    def start_agent(self, host, directory, *overrides, base=TINY, options=()):
        """Starts torchrun on one host, elastic with one or two hosts; the first hosts the
        rendezvous."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, "-m",
             "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
             "--max-restarts", "5", "--monitor-interval", "0.1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"{self.subnet}.1:29400", "--rdzv-id", "elastic", "--rdzv-conf",
             f"is_host={int(host == 0)},keep_alive_interval=1,keep_alive_max_attempt=3,"
             "last_call_timeout=1",
             "--local-addr", f"{self.subnet}.{host + 1}", *options, "-m", "train", "fit",
             *base, f"run.dir={directory}", *overrides],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # Without this, torchrun 2.13 does not send the address of rank 0 to a host that joins
            # later.
            env={**environment(), "GLOO_SOCKET_IFNAME": self.cables[host],
                 "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip

    def start_node_agent(self, host, command, *options, env=(), output=None):
        """Starts our agent on one host, with a command. ``output``: a file for all that it prints
        instead of pipes."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, "-m", "launch.agent",
             "--node-rank", str(host), "--local-addr", f"{self.subnet}.{host + 1}",
             "--preflight", "off", *options, "--", *command],
            cwd=ROOT, stdout=output or subprocess.PIPE, stderr=output or subprocess.PIPE, text=True,
            env={**environment(), "GLOO_SOCKET_IFNAME": self.cables[host], **dict(env)},
        )  # fmt: skip

    def lose(self, host):
        """Kills all processes on a host at once."""
        for pid in ip("netns", "pids", self.names[host]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
