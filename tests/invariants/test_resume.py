"""I3: a step is committed or did not happen; a resumed run equals an uninterrupted one."""

import json
import os
import signal
import time

import pytest

from tests.support.forked import quick_run as run
from tests.support.forked import quick_start as start
from tests.support.lanes import slow
from tests.support.runs import (
    assert_same_bits,
    checkpoints,
    curve,
    metrics,
    state,
    tensors,
)
from train.checkpoint.attempts import Attempts
from train.goodput.read import read_goodput

EVERYTHING = [
    "checkpoint.every_steps=7",
    "checkpoint.keep_last=99",
    "checkpoint.asynchronous=false",  # otherwise the next steps run during a write
    "evaluate.every_steps=5",
    "ema.decay=0.9",
    "early_stop.patience=30",
    "loader.workers=0",
    "batch.micro_batch_size=5",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *EVERYTHING)
    return directory


def same_result(one, other):
    assert_same_bits(tensors(one), tensors(other))
    a, b = state(one), state(other)
    for volatile in ("run", "attempt"):
        a.pop(volatile), b.pop(volatile)
    assert a == b
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate", "eval/loss"):
        assert curve(one, key) == curve(other, key), key


@pytest.mark.parametrize("step", [slow(1), slow(8), 20, slow(40)])
def test_a_run_killed_at_any_step_resumes_bitwise_equal(undisturbed, tmp_path, step):
    run("fit", tmp_path, *EVERYTHING, f"task.kill_at_step={step * 3}", expect=-signal.SIGKILL)
    run("fit", tmp_path, *EVERYTHING)
    resumed = [json.loads(line) for line in (tmp_path / "attempts.jsonl").open()][-1]
    assert resumed["resumed_from_step"] == ((step - 1) // 7 * 7 or None)
    same_result(undisturbed, tmp_path)
    assert "all well" in run("verify", tmp_path).stdout


def test_no_step_appears_twice_in_the_metrics(tmp_path):
    options = [
        "task.kill_at_step=33",
        "checkpoint.every_steps=10",
        "checkpoint.asynchronous=false",
        "evaluate.every_steps=10",
    ]
    run("fit", tmp_path, *options, expect=-signal.SIGKILL)
    torn = tmp_path / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 33, "train/lo')
    run("fit", tmp_path, *options)
    rows = metrics(tmp_path)
    assert sorted(r["step"] for r in rows if "train/loss" in r) == list(range(1, 41))
    assert [r["step"] for r in rows if "eval/loss" in r] == [10, 20, 30, 40]
    assert {r["attempt"] for r in rows} == {1, 2}


def test_a_run_stopped_by_a_signal_saves_and_resumes(undisturbed, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        before = max(checkpoints(tmp_path), default=0)
        process = start("fit", tmp_path, *EVERYTHING, "task.sleep=0.02")
        wait_for_step(process, tmp_path, before + 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "-m train fit" in out
        assert checkpoints(tmp_path)[-1] > before
    run("fit", tmp_path, *EVERYTHING)
    same_result(undisturbed, tmp_path)
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").open()]
    assert [a["attempt"] for a in attempts] == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = start("fit", tmp_path, "task.sleep=100")
    wait_for(process, (tmp_path / "ledger.bin").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "without saving" in err
    assert checkpoints(tmp_path) == []
    ended = Attempts(tmp_path / "attempts.jsonl").last()["ended"]
    assert (ended["code"], ended["reason"]) == (130, "stopped by a second Ctrl-C, without saving")
    assert [attempt.exit for attempt in read_goodput(tmp_path).attempts] == [130]


def test_a_finished_run_is_reported_and_not_changed(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "lock"}
    done = run("fit", undisturbed, *EVERYTHING)
    assert "is already finished, at step 40" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "lock"} == before


@pytest.mark.parametrize("change", ["optim.lr=0.5", "length.steps=20"])
def test_a_change_that_leaves_a_finished_run_nothing_to_train_is_refused(undisturbed, change):
    """Else the run would seem to be the result of the changed config."""
    kept = ["config.json", "attempts.jsonl", "finished.json", "metrics.jsonl", "ledger.bin"]
    before = [(undisturbed / name).read_bytes() for name in kept]
    done = run("fit", undisturbed, *EVERYTHING, change, "--allow-changes", expect=76)
    assert "is finished, at step 40, and the changed config asks for" in done.stderr
    assert [(undisturbed / name).read_bytes() for name in kept] == before


def test_a_changed_config_is_refused_without_allow_changes(tmp_path):
    run("fit", tmp_path, "task.kill_at_step=20", "checkpoint.every_steps=5", expect=-9)
    refused = run("fit", tmp_path, "optim.lr=0.5", "track.log_every_steps=2", expect=76)
    assert "optim.lr: 0.01 -> 0.5 (command line)" in refused.stderr
    assert "log_every_steps" not in refused.stderr
    run("fit", tmp_path, "optim.lr=0.5", "--allow-changes")
    last = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert "optim.lr: 0.01 -> 0.5" in last["changes"]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_moments(tmp_path, workers):
    """Up to eight kills for each number of workers, every second one while a checkpoint is being
    written."""
    import random

    base = [
        "length.steps=250", "checkpoint.every_steps=3", "model.hidden=512",
        "track.log_every_steps=5", f"loader.workers={workers}",
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run("fit", straight, *base)
    chance = random.Random(workers)
    kills = in_save = 0
    while True:
        before = max(checkpoints(killed), default=0)
        process = start("fit", killed, *base, "task.sleep=0.01")
        if kills < 8:
            target = before + chance.randint(2, 25)
            wait_for(process, lambda t=target: max(checkpoints(killed), default=0) >= t)
            if kills % 2:
                wait_for(process, lambda: writing(killed))
                in_save += 1
            time.sleep(chance.random() * 0.02)
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 6
    assert in_save >= 3
    assert_same_bits(tensors(straight), tensors(killed))
    assert curve(straight) == curve(killed)
    verified = run("verify", killed, *base).stdout
    assert "all well" in verified
    assert not writing(killed)


def writing(directory):
    try:
        return any(n.startswith(".writing") for n in os.listdir(directory / "checkpoints"))
    except FileNotFoundError:
        return False


def wait_for_step(process, directory, step):
    def reached():
        path = directory / "metrics.jsonl"
        return path.exists() and any(f'"step": {step},' in line for line in path.open())

    wait_for(process, reached)


def wait_for(process, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_when_the_output_pipe_is_closed(tmp_path, times):
    """As with ``fit 2>&1 | tee log``: the same Ctrl-C ends tee."""
    # The second Ctrl-C comes within a step, before the stop of the first one saves.
    process = start("fit", tmp_path, f"task.sleep={0.05 if times == 1 else 5}")
    wait_for(process, (tmp_path / "ledger.bin").exists)
    time.sleep(0.5)
    process.stdout.close()
    process.stderr.close()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    code = process.wait(60)
    assert code == (143 if times == 1 else 130)
    assert bool(checkpoints(tmp_path)) == (times == 1)


def test_a_broken_pipe_in_the_task_is_reported_as_an_error(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:BrokenReport", expect=70)
    assert "BrokenPipeError" in done.stderr
    assert not (tmp_path / "finished.json").exists()
