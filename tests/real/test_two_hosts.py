"""One run on two hosts made of network namespaces that a veth pair connects."""

import signal
import time

import pytest

from tests.support.hosts import why_not
from tests.support.runs import TINY, checkpoints, run
from train.data.ledger import read_steps
from train.parity.compare import curve, largest_difference

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


SMALL_TEXT = [
    "--config", "configs/text.yaml", "model.layers=2", "model.heads=2", "model.width=32",
    "data.context=64", "task.sample_tokens=8", "batch.global_batch_size=24", "optim.lr=1e-3", "length.steps=50",
    "schedule.warmup_steps=5", "evaluate.every_steps=null", "evaluate.micro_batch_size=64", "track.tensorboard=false",
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


def test_a_broken_connection_ends_both_ranks_and_they_resume_later(hosts, tmp_path):
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
