"""Hosts that are lost, and hosts that come back, while torchrun keeps the run going."""

import json
import time

import pytest

from tests.support.hosts import Hosts, why_not
from tests.support.runs import checkpoints, metrics, run
from train.parity import curve, largest_difference

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

OPTIONS = [
    "checkpoint.every_steps=10", "checkpoint.asynchronous=false", "watchdog.timeout=5",
    "task.sleep=0.05", "length.steps=600", "batch.micro_batch_size=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts():
    made = Hosts()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *OPTIONS, "task.sleep=0")
    return directory


def attempts(directory):
    file = directory / "attempts.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def wait_until(condition, seconds, agents):
    """Returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert agents[0].poll() is None, agents[0].communicate()
        assert time.monotonic() - started < seconds, "it took too long"
        time.sleep(0.05)
    return time.monotonic() - started


def going_on_with(directory, world_size):
    """Whether the newest attempt has this many ranks and has taken a step."""
    newest = attempts(directory)[-1] if attempts(directory) else None
    return (
        newest is not None
        and newest["world_size"] == world_size
        and any(row.get("attempt") == newest["attempt"] for row in metrics(directory))
    )


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_host_is_lost_and_another_comes(hosts, tmp_path, undisturbed, how):
    agents = [hosts.start_agent(host, tmp_path, *OPTIONS) for host in (0, 1)]
    try:
        wait_until(lambda: going_on_with(tmp_path, 2) and checkpoints(tmp_path), 90, agents)
        if how == "cut off":
            hosts.cut()
        else:
            hosts.lose(1)
        alone = wait_until(lambda: going_on_with(tmp_path, 1), 120, agents)
        hosts.lose(1)
        agents[1].wait()
        hosts.mend()
        agents.append(hosts.start_agent(1, tmp_path, *OPTIONS))
        joined = wait_until(lambda: going_on_with(tmp_path, 2), 120, agents)
        print(f"{how}: the other goes on alone after {alone:.1f} s; both after {joined:.1f} s")
        outputs = [agent.communicate(timeout=120) for agent in (agents[0], agents[2])]
        assert [agents[0].returncode, agents[2].returncode] == [0, 0], outputs
    finally:
        hosts.mend()
        for host in (0, 1):
            hosts.lose(host)
    assert [a["world_size"] for a in attempts(tmp_path)] == [2, 1, 2]
    assert "all well" in run("verify", tmp_path).stdout
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert largest_difference(curve(undisturbed, key), curve(tmp_path, key)) <= 1e-5
