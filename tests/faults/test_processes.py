"""Two processes on one run directory, killed processes, and data workers."""

import json
import os
import signal
import socket

import pytest

from tests.support.forked import run, run_ranks, start, wait_for
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory)
    return directory


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_first_is_named(undisturbed, tmp_path):
    first = start("fit", tmp_path, "task.sleep=0.05")
    wait_for(first, (tmp_path / "ledger.bin").exists)
    second = run("fit", tmp_path, expect=76)
    (line,) = second.stderr.splitlines()
    assert f"{tmp_path} is in use by process {first.pid} on {socket.gethostname()} since " in line
    # The same error comes before any other reason to refuse.
    assert "is in use by" in run("fit", tmp_path, "optim.lr=0.5", expect=76).stderr
    done = first.wait()
    assert done.returncode == 0, done.stderr
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))
    assert curve(undisturbed) == curve(tmp_path)
    assert len((tmp_path / "attempts.jsonl").read_text().splitlines()) == 1
    assert "all well" in run("verify", tmp_path).stdout


@pytest.mark.parametrize("workers", [slow(0), 2])
def test_a_killed_run_can_be_restarted_at_once(undisturbed, tmp_path, workers):
    """Data workers live seconds longer than their killed parent, but do not hold the lock."""
    base = [f"loader.workers={workers}", "checkpoint.every_steps=10"]
    process = start("fit", tmp_path, *base, "task.sleep=0.03")
    wait_for(process, lambda: checkpoints(tmp_path))
    process.signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    run("fit", tmp_path, *base)
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))


@pytest.mark.parametrize("context", [slow("spawn"), slow("forkserver")])
def test_workers_can_use_any_start_method(undisturbed, tmp_path, context):
    run("fit", tmp_path, "loader.workers=1", f"loader.multiprocessing_context={context}")
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))


def test_a_killed_worker_ends_the_run_with_75(undisturbed, tmp_path):
    process = start(
        "fit", tmp_path, "loader.workers=1", "task.sleep=0.05", "checkpoint.every_steps=5"
    )
    wait_for(process, lambda: checkpoints(tmp_path))
    os.kill(a_worker_of(process.pid), signal.SIGKILL)
    done = process.wait()
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert "A data worker failed (" in line
    assert "lower loader.workers" in line
    run("fit", tmp_path, "loader.workers=1")
    assert_same_bits(tensors(undisturbed), tensors(tmp_path))


def a_worker_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return int(file.read().split()[0])


def test_a_stop_request_to_one_rank_stops_all(tmp_path):
    """All ranks agree, save and resume together; other tests cover a single process."""
    base = ["batch.micro_batch_size=3", "checkpoint.every_steps=1000"]
    run("fit", tmp_path / "one", *base)
    run_ranks(2, "fit", tmp_path / "two", *base, "task.stop_rank_1_at=10",
              "task.use=tests.faults.tasks:StopsOneRank", expect=143)  # fmt: skip
    assert checkpoints(tmp_path / "two") == [5]
    run_ranks(2, "fit", tmp_path / "two", *base, "task.use=tests.faults.tasks:StopsOneRank")
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert json.loads((tmp_path / "two/finished.json").read_text())["attempt"] == 2
