"""A run that is long enough to lose and add hosts, and its progress."""

import json
import time

from tests.support.runs import metrics, run
from train.parity.compare import curve, largest_difference

LONG = [
    "checkpoint.every_steps=10", "checkpoint.asynchronous=false", "watchdog.timeout=6",
    "task.sleep=0.05", "length.steps=500", "batch.micro_batch_size=6",
]  # fmt: skip


def attempts(directory):
    file = directory / "attempts.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def going_on_with(directory, world_size, after=0):
    """Whether the newest attempt, if later than ``after``, has this world size and has taken
    steps."""
    newest = attempts(directory)[-1] if len(attempts(directory)) > after else None
    return (
        newest is not None
        and newest["world_size"] == world_size
        and any(row.get("attempt") == newest["attempt"] for row in metrics(directory))
    )


def wait_until(condition, agents=(), seconds=120):
    """Waits for a condition; returns the seconds. Fails if an agent ends."""
    started = time.monotonic()
    while not condition():
        for agent in agents:
            assert agent.poll() is None, agent.communicate()
        assert time.monotonic() - started < seconds, "timed out"
        time.sleep(0.05)
    return time.monotonic() - started


def assert_undisturbed(directory, undisturbed):
    assert "all well" in run("verify", directory).stdout
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert largest_difference(curve(undisturbed, key), curve(directory, key)) <= 1e-5
