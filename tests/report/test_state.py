"""The state of a run, from what is in its directory."""

import fcntl

import pytest

from tests.support.report_files import START, write, write_run
from train.report.data import read_run
from train.report.state import find_state, is_in_progress


def attempt(code=None):
    ended = {} if code is None else {"ended": {"time": START, "code": code, "reason": "so"}}
    return {1: {"attempt": 1, "time": START, **ended}}


@pytest.mark.parametrize(
    ("attempts", "finished", "kind"),
    [
        ({}, False, "new"), (attempt(), False, "ended"), (attempt(0), True, "finished"),
        (attempt(143), False, "stopped"), (attempt(130), False, "stopped"),
        (attempt(70), False, "failed"), (attempt(75), False, "failed"),
        (attempt("0"), False, "ended"),
    ],
)  # fmt: skip
def test_a_run_that_is_not_in_progress(tmp_path, attempts, finished, kind):
    assert find_state(tmp_path, attempts, is_finished=finished).kind == kind


def test_a_run_whose_lock_is_held_is_in_progress_and_stays_so(tmp_path):
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not is_in_progress(tmp_path), "nobody has signed the lock"
        file.write("process 1 on a host")
        file.flush()
        assert is_in_progress(tmp_path)
        assert find_state(tmp_path, attempt(), is_finished=False).kind == "running"
    assert not is_in_progress(tmp_path), "a killed process leaves its name, but not the lock"


def test_a_heartbeat_of_another_machine_counts_while_it_is_fresh(tmp_path):
    import os

    beats = tmp_path / "heartbeats"
    beats.mkdir()
    write(beats / "rank-0.json", {})
    assert is_in_progress(tmp_path)
    os.utime(beats / "rank-0.json", (START, START))
    assert not is_in_progress(tmp_path)


def test_a_stop_is_marked_at_the_step_that_the_next_attempt_resumed_from(tmp_path):
    write_run(tmp_path, every=7)
    marks = {mark.kind: mark.step for mark in read_run(tmp_path).marks}
    assert marks["stop"] == 260
    assert marks["fault"] == 100
