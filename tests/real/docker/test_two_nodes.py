"""Two containers on a network as two nodes of one run, each with its own address."""

import json

import pytest

from tests.support.runs import checkpoints, curve, run
from train.data.ledger import read_steps

# The first test waits until the image is built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Only the first test runs the preflight; the others are faster without it.
UNSEEN = ["--preflight", "off"]
SAVING = ["checkpoint.every_steps=5", "checkpoint.asynchronous=false", "batch.micro_batch_size=6"]


@pytest.fixture
def undisturbed(nodes):
    """The same run on the host, on one process."""

    def start(*overrides):
        run("fit", nodes.runs / "host", "batch.micro_batch_size=6", *overrides)
        return nodes.runs / "host"

    return start


def same(one, other):
    assert read_steps(one / "ledger.bin") == read_steps(other / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm"):
        assert curve(other, key) == pytest.approx(curve(one, key), abs=1e-5)


def verify(nodes, name):
    assert "all well" in run("verify", nodes.runs / name).stdout


def test_the_run_is_the_same_as_on_the_host(nodes, undisturbed):
    said = nodes.run_agents("two", *SAVING)
    assert "2 x cpu" in said
    verify(nodes, "two")
    same(undisturbed(), nodes.runs / "two")
    # Each node had its own container.
    attempt = json.loads((nodes.runs / "two" / "attempts.jsonl").read_text().splitlines()[0])
    assert attempt["hosts"] == ["node0", "node1"]


def test_a_stopped_run_saves_exits_with_143_and_resumes(docker, nodes, undisturbed):
    names = nodes.start_agents("two", *SAVING, "task.sleep=0.1", agent=UNSEEN)
    nodes.wait_for_checkpoint("two", names)
    docker("stop", "--time", "60", *names)
    assert nodes.finish(names) == [143, 143], nodes.said
    stopped_at = checkpoints(nodes.runs / "two")[-1]
    assert stopped_at < 40
    nodes.run_agents("two", *SAVING, agent=UNSEEN)
    verify(nodes, "two")
    same(undisturbed(), nodes.runs / "two")


def test_a_killed_container_ends_the_run_with_75_and_it_resumes(docker, nodes, undisturbed):
    names = nodes.start_agents("two", *SAVING, "task.sleep=0.1", agent=UNSEEN)
    nodes.wait_for_checkpoint("two", names)
    docker("kill", names[1])
    assert nodes.finish(names) == [75, 137], nodes.said
    nodes.run_agents("two", *SAVING, agent=UNSEEN)
    attempts = (nodes.runs / "two" / "attempts.jsonl").read_text().splitlines()
    assert json.loads(attempts[1])["resumed_from_step"] > 0, "the run started from the beginning"
    verify(nodes, "two")
    same(undisturbed(), nodes.runs / "two")


def test_too_little_shared_memory_is_reported_before_training(nodes):
    """The workers of two ranks need about 2 MB each for their prefetched batches."""
    base = ["--config", "configs/digits.yaml", "batch.global_batch_size=1400", "loader.workers=4"]
    said = nodes.run_agents(
        "two", base=base, options=["--shm-size", "1m"], agent=["--preflight", "full"], expect=64
    )
    assert "/dev/shm has 1.0 MiB free" in said
    assert "--shm-size" in said
    assert not (nodes.runs / "two" / "attempts.jsonl").exists()


def test_a_config_error_ends_both_nodes_with_64(nodes):
    said = nodes.run_agents("two", "optim.lrr=3", agent=UNSEEN, expect=64)
    assert "did you mean optim.lr" in said
