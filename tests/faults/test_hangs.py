"""A run that hangs is ended, and a report names the rank, the phase and the line of code."""

import json
import os
import signal
import time

import pytest

from tests.support.forked import run, run_ranks, start, start_ranks, wait_for
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors
from train.checkpoint.run_view import Run
from train.process import watchdog
from train.process.watchdog import Watchdog, WatchdogConfig, describe_hang
from train.runs.summary import current_condition

TASK = "task.use=tests.faults.tasks:Hangs"
SHORT = ["watchdog.timeout=3", "checkpoint.every_steps=3", "checkpoint.asynchronous=false"]


def report(directory, attempt=1):
    return (directory / f"hangs/attempt-{attempt}/report.txt").read_text()


@pytest.mark.slow
def test_a_single_process_that_hangs(tmp_path):
    done = run("fit", tmp_path, TASK, *SHORT, expect=75)
    assert (
        "No progress for 3 s: the process made no progress in computing a micro-batch of step 5"
        in (done.stderr)
    )
    assert "in never_ends" in report(tmp_path)
    assert "never_ends" in (tmp_path / "logs/rank-0.log").read_text()
    ended = Run(tmp_path).attempts[-1]["ended"]
    assert (ended["code"], ended["reason"]) == (75, report(tmp_path).splitlines()[0])
    assert current_condition(tmp_path).state == "hung"
    run("fit", tmp_path, TASK, *SHORT)
    run("fit", tmp_path.with_name("other"), TASK.replace("Hangs", "TinyTask").replace(
        "tests.faults.tasks", "tests.support.tiny"))  # fmt: skip
    assert_same_bits(tensors(tmp_path.with_name("other")), tensors(tmp_path))


@pytest.mark.parametrize("culprit", ["0", slow("1")])
def test_the_rank_that_is_behind_is_named(tmp_path, culprit):
    done = run_ranks(2, "fit", tmp_path, TASK, *SHORT, f"task.hang_rank='{culprit}'", expect=75)
    text = report(tmp_path)
    first = text.splitlines()[0]
    assert f"rank {culprit} (" in first
    assert "is behind, in computing a micro-batch of step 5" in first
    assert f"rank {1 - int(culprit)} (" not in first
    assert "in never_ends" in text
    assert sum("No progress for 3 s" in result.stderr for result in done) == 1
    assert all("report.txt. Rerun to resume" in result.stderr for result in done)
    ended = Run(tmp_path).attempts[-1]["ended"]
    assert (ended["code"], ended["reason"]) == (75, first)
    run_ranks(2, "fit", tmp_path, TASK, *SHORT)


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_other(tmp_path):
    ranks = start_ranks(2, "fit", tmp_path, "task.sleep=0.03", *SHORT)
    wait_for(ranks[0], lambda: checkpoints(tmp_path))
    ranks[1].signal(signal.SIGSTOP)
    try:
        done = ranks[0].wait()
    finally:
        ranks[1].signal(signal.SIGKILL)
    assert done.returncode == 75
    assert ranks[1].wait().returncode == -signal.SIGKILL
    assert "rank 1 (" in report(tmp_path).splitlines()[0]
    assert "is frozen or dead" in report(tmp_path).splitlines()[0]
    run_ranks(2, "fit", tmp_path, *SHORT)


@pytest.mark.slow
def test_a_slow_step_within_the_limit_is_not_a_hang(tmp_path):
    run("fit", tmp_path, "task.sleep=0.5", "watchdog.timeout=2", "length.steps=6")
    assert not (tmp_path / "hangs").exists()
    assert not (tmp_path / "heartbeats").exists()


def test_the_first_step_has_its_own_limit(tmp_path):
    base = ["task.hang_at=1", "length.steps=6", "watchdog.timeout=null"]
    done = run("fit", tmp_path, TASK, *base, "watchdog.first_timeout=1", expect=75)
    assert "No progress for 1 s" in done.stderr


def test_the_text_of_a_report():
    now = time.time()
    beat = {"host": "a", "phase": "saving", "step": 4, "time": now, "silent": 9.0}
    both = [{"rank": 0, "beats": 7, **beat}, {"rank": 1, "beats": 7, **beat}]
    assert "all ranks made no progress in saving of step 5" in describe_hang(both, 2, 9.0, now)
    text = describe_hang(both, 3, 9.0, now)
    assert "rank 2 never sent a heartbeat" in text
    both[1] |= {"time": now - 60, "beats": 3}
    assert "rank 1 (a) is frozen or dead: no heartbeat for 60 s" in describe_hang(both, 2, 9.0, now)


def test_the_report_has_what_nccl_knows(tmp_path, monkeypatch):
    class EndedError(Exception):
        pass

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(watchdog, "uses_gpu", lambda: True)
    monkeypatch.setattr(watchdog, "flight_recorder", lambda environ, rank: f"/tmp/trace-{rank}")
    monkeypatch.setattr(watchdog, "ras_status", lambda environ: "rank 3 is INCOMPLETE")
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(EndedError, match="75"):
        Watchdog(WatchdogConfig(), tmp_path, 0, 1, 1)._end_hung_run(5.0)
    text = report(tmp_path)
    assert "\n\nNCCL RAS:\nrank 3 is INCOMPLETE\n" in text
    assert "rank 0:\nNCCL flight recorder: /tmp/trace-0 (read it with torchfrtrace)\n" in text
    assert "test_the_report_has_what_nccl_knows" in text, "the stacks come after it"


def test_a_straggler_is_named_once(tmp_path):
    done = run_ranks(
        2, "fit", tmp_path, "task.use=tests.faults.tasks:OneRankIsSlow", "length.steps=12",
        "batch.micro_batch_size=6",
    )  # fmt: skip
    assert done[0].stderr.count("Rank 1 (") == 1
    assert "slows down the others: per step it takes" in done[0].stderr
    assert "Rank 0 (" not in done[0].stderr


def test_out_of_memory_is_reported_with_advice(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:TooLarge", expect=71)
    assert "isorun: error: Out of memory (" in done.stderr
    assert "lower batch.micro_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stop_file_has_the_effect_of_a_signal(tmp_path):
    process = start("fit", tmp_path, "task.sleep=0.05")
    wait_for(process, lambda: os.path.exists(tmp_path / "metrics.jsonl") and curve(tmp_path))
    (tmp_path / "stop").touch()
    assert process.wait().returncode == 143
    saved = checkpoints(tmp_path)[-1]
    assert 0 < saved < 40
    run("fit", tmp_path)  # the file applied to the earlier attempt
    assert not (tmp_path / "stop").exists()
    last = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert last["resumed_from_step"] == saved


@pytest.mark.slow
def test_a_step_that_does_not_end_before_the_deadline(tmp_path):
    slow = ["stop.deadline=2", "stop.margin=1", "checkpoint.every_steps=2"]
    process = start("fit", tmp_path, TASK, "task.hang_at=6", *slow, "checkpoint.asynchronous=false")
    wait_for(process, lambda: 4 in checkpoints(tmp_path))
    time.sleep(0.3)
    process.signal(signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 75
    assert "did not stop within stop.deadline (2 s" in done.stderr
    assert "The last committed checkpoint is that of step 4; the 1 steps since are lost" in (
        done.stderr
    )
    ended = Run(tmp_path).attempts[-1]["ended"]
    assert ended["code"] == 75
    assert ended["reason"].startswith("did not stop within stop.deadline (2 s")
    run("fit", tmp_path, TASK, *slow)


@pytest.mark.slow
def test_a_stop_between_two_micro_batches(tmp_path):
    """A step with many micro-batches is abandoned; the next attempt uses its samples."""
    many = ["batch.micro_batch_size=1", "task.sleep=0.2"]
    ranks = start_ranks(2, "fit", tmp_path, *many)
    wait_for(ranks[0], lambda: os.path.exists(tmp_path / "ledger.bin"))
    time.sleep(1.5)
    ranks[1].signal(signal.SIGTERM)
    for rank in ranks:
        assert rank.wait().returncode == 143
    run_ranks(2, "fit", tmp_path, "batch.micro_batch_size=1")
    assert "all well" in run("verify", tmp_path).stdout
