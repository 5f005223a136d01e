"""Two hosts, made of network namespaces that are joined by a cable (a veth pair)."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support.runs import ROOT, TINY, checkpoints, environment, run
from train.data.ledger import read_steps
from train.parity import curve, largest_difference

SUBNET = "10.213.77"


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not():
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"isorun-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here ({error.stderr.strip()})"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Hosts:
    """Two namespaces; ``start`` runs a command with one rank on each."""

    def __init__(self):
        self.names = [f"isorun-{os.getpid()}-{side}" for side in "ab"]
        self.cables = [f"iso{os.getpid() % 100000}{side}" for side in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def close(self):
        for name in self.names:
            ip("netns", "del", name)  # takes its end of the cable along

    def cut(self):
        ip("-n", self.names[0], "link", "set", self.cables[0], "down")

    def mend(self):
        ip("-n", self.names[0], "link", "set", self.cables[0], "up")

    def start(self, directory, *overrides, base=TINY):
        shared = {
            "MASTER_ADDR": f"{SUBNET}.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2",
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


@pytest.fixture(scope="module")
def hosts():
    made = Hosts()
    yield made
    made.close()


SMALL_TEXT = [
    "--config", "configs/text.yaml", "model.layers=2", "model.heads=2", "model.width=32",
    "data.context=64", "batch.global_batch_size=24", "optim.lr=1e-3", "length.steps=50",
    "schedule.warmup_steps=5", "evaluate.every_steps=null", "track.tensorboard=false",
    "track.wandb=disabled", "track.log_every_steps=1", "batch.micro_batch_size=12",
]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize(
    "base", [[*TINY, "batch.micro_batch_size=6"], SMALL_TEXT], ids=["tiny", "text"]
)
def test_the_same_run_on_two_hosts(hosts, tmp_path, base, strategy):
    run("fit", tmp_path / "one", base=base)
    hosts.run(tmp_path / "two", f"strategy={strategy}", base=base)
    one, two = tmp_path / "one", tmp_path / "two"
    assert read_steps(one / "ledger.bin") == read_steps(two / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert largest_difference(curve(one, key), curve(two, key)) <= 1e-5


def test_a_cut_cable_ends_both_and_they_go_on_afterwards(hosts, tmp_path):
    base = ["checkpoint.every_steps=5", "checkpoint.asynchronous=false", "watchdog.timeout=4"]
    ranks = hosts.start(tmp_path, *base, "task.sleep=0.05")
    deadline = time.monotonic() + 60
    while not checkpoints(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hosts.cut()
    try:
        outputs = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        hosts.mend()
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    assert "No progress for 4 s" in (tmp_path / "hangs/attempt-1/report.txt").read_text()
    hosts.run(tmp_path, *base)
    assert "all well" in run("verify", tmp_path).stdout
    run("fit", tmp_path / "undisturbed", "batch.micro_batch_size=6")
    one, two = curve(tmp_path / "undisturbed", "train/loss"), curve(tmp_path, "train/loss")
    assert largest_difference(one, two) <= 1e-5
