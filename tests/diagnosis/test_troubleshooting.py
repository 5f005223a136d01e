"""docs/troubleshooting.md by symptom: each command names the cause, on a run that is broken on
purpose."""

import json
import re
import shutil
import time

import pytest

from tests.diagnosis.test_overfit import BASE as BROKEN
from tests.support.broken import BrokenTask, Points
from tests.support.forked import Command, command, run
from tests.support.runs import ROOT

TESTED = {
    "NaN", "a sudden high loss", "flat loss", "slow data", "low speed/mfu", "out of memory", "hang",
    "different results after a resume", "a slow first step", "W&B misses rows",
    "slow or stuck right now",  # in tests/test_stacks.py
}  # fmt: skip


def test_each_symptom_of_the_page_has_a_test():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.split("## By symptom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!symptom|---)(.+?) \|", table, re.MULTILINE)
    found = {re.split(r"[:(,]", row.replace("`", ""))[0].strip() for row in rows}
    assert found == TESTED


class SlowPoints(Points):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


class SlowData(BrokenTask):
    def train_dataset(self):
        return SlowPoints("not")


class SlowHost(BrokenTask):
    """Waits in Python: in every step, or (``how`` is first) in the first one only."""

    def loss(self, model, batch):
        calls = self.calls = getattr(self, "calls", 0) + 1
        if self.config.task.how != "first":
            time.sleep(0.2)
        elif calls == 1:
            time.sleep(2.0)
        return super().loss(model, batch)


def profile(directory, task, *words):
    base = [f"task.use=tests.diagnosis.test_troubleshooting:{task}", *BROKEN[1:]]
    return json.loads(run("profile", directory, "--json", *words, base=base).stdout)


def largest(found):
    return max(found["shares"], key=found["shares"].get)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run with a value that is not finite, which has saved each step."""
    directory = tmp_path_factory.mktemp("broken") / "run"
    words = ["task.how=overflow", "track.wandb=disabled", "length.steps=4"]
    run("fit", directory, *words, "checkpoint.every_steps=1", base=BROKEN)
    return directory


def test_nan(broken):
    done = command("replay", broken, "--step", "4", "--anomaly", "--from", "1")
    assert "the first output that is not finite is that of 0 (Linear)" in done.stdout


def test_a_spike(tmp_path):
    words = ["task.use=tests.faults.tasks:Spiky", "data.spikes=[12]", "length.steps=12"]
    run("fit", tmp_path / "run", *words, "optim.spike={factor: 10, window: 8}")
    file = tmp_path / "batch.pt"
    done = command("replay", tmp_path / "run", "--step", "12", "--batch", file)
    assert "step 12 is skipped: it is a spike" in done.stdout
    assert file.exists()


def test_flat_loss(tmp_path):
    done = run("overfit", tmp_path / "run", "task.how=dead", base=BROKEN, expect=65)
    assert "the output of 1 (ReLU) is 0 for every sample" in done.stdout


def test_slow_data(tmp_path):
    assert largest(profile(tmp_path / "run", "SlowData")) == "data"


def test_low_throughput(tmp_path):
    assert largest(profile(tmp_path / "run", "SlowHost")) == "host"


def test_a_slow_first_step(tmp_path):
    base = ["task.use=tests.diagnosis.test_troubleshooting:SlowHost", *BROKEN[1:]]
    done = run("fit", tmp_path / "run", "task.how=first", "--dry-run", base=base)
    seconds = {line[:26].strip(): line[26:].split()[:1] for line in done.stdout.splitlines()}
    (first,), (second,) = seconds["step 1"], seconds["step 2"]
    assert float(first) > max(2.0, float(second))


def test_out_of_memory(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:Hungry", expect=71)
    assert "batch.micro_batch_size=6 needs about" in done.stderr


def test_a_hang(tmp_path):
    words = ["task.use=tests.faults.tasks:Hangs", "watchdog.timeout=3"]
    run("fit", tmp_path, *words, expect=75)
    (report,) = (tmp_path / "hangs").glob("attempt-*/report.txt")
    assert "in never_ends" in report.read_text()


def test_another_result_after_a_resume(broken, tmp_path):
    base = ["task.use=tests.diagnosis.test_dry_run:RemembersTask", *BROKEN[1:]]
    done = run("fit", tmp_path / "run", "--dry-run", base=base, expect=64)
    assert "have state that no checkpoint has" in done.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(broken, damaged)
    ledger = damaged / "ledger.bin"
    content = ledger.read_bytes()
    ledger.write_bytes(content[:60] + content[104:])  # without the first step
    done = command("verify", damaged, expect=65)
    assert "step 1 is missing" in done.stdout + done.stderr


@pytest.mark.slow
def test_rows_that_wandb_misses(tmp_path):
    pytest.importorskip("wandb")
    from tests.support.wandb_server import WandbServer

    run("fit", tmp_path, "track.wandb=offline", "length.steps=6", "schedule.warmup_steps=0")
    with WandbServer() as server:
        env = {"WANDB_API_KEY": "", **server.environment}
        done = Command("sync", str(tmp_path), env=env).wait()
        (tracked,) = server.runs.values()
    assert "uploaded offline-run-" in done.stdout + done.stderr
    assert tracked.steps == [1, 2, 3, 4, 5, 6]
