"""How the files of a run directory tell a run in progress from one that was killed."""

import json
import os
import time

import pytest

from tests.support.run_files import beat, here, make_run
from train.checkpoint.run_directory import RunDirectory
from train.runs.state import ends_of
from train.runs.summary import current_condition

ELSEWHERE = ("another-machine", 7)
NO_PROCESS = 999_999_999  # larger than any process id of Linux


def ended(code, reason="so it was"):
    return {"ended": {"time": 1e9 + 50, "code": code, "reason": reason}}


@pytest.mark.parametrize(
    ("attempt", "state", "name"),
    [
        (ended(0), "finished", "DONE"),
        (ended(143), "stopped", "PREEMPTED"),
        (ended(130), "stopped", "STOPPED_AT_ONCE"),
        (ended(70), "failed", "INTERNAL"),
        (ended(-9), "failed", "SIGKILL"),
        (ended(137), "failed", "SIGKILL"),
        (ended(5), "failed", ""),
    ],
)
def test_a_recorded_end_gives_the_state(tmp_path, attempt, state, name):
    found = current_condition(make_run(tmp_path / "run", attempts=[attempt]))
    assert (found.state, found.end.name, found.end.reason) == (state, name, "so it was")
    assert found.last_sign == 1e9 + 50


@pytest.mark.parametrize("damage", [{"ended": 5}, {"ended": {"code": "1"}}, {"time": "now"}])
def test_an_end_that_is_not_one_is_none(tmp_path, damage):
    assert current_condition(make_run(tmp_path / "run", attempts=[damage])).state == "dead"


def test_a_run_whose_process_holds_the_lock_is_running(tmp_path):
    path = make_run(tmp_path / "run", attempts=[ended(75), {}])
    directory = RunDirectory(path)
    directory.acquire()
    found = current_condition(path)
    assert (found.state, found.end.code) == ("running", 75)
    directory.release()
    assert current_condition(path).state == "dead"


def test_the_lock_of_a_killed_process_does_not_count(tmp_path):
    path = make_run(tmp_path / "run", lock=(here()[0], NO_PROCESS))
    assert current_condition(path).state == "dead"


def test_a_process_that_got_the_id_of_a_killed_one_does_not_count(tmp_path):
    path = make_run(tmp_path / "run", lock=here())
    assert current_condition(path).state == "running"
    os.utime(path / "lock", (1e9, 1e9))  # long before this process started
    assert current_condition(path).state == "dead"


@pytest.mark.parametrize(("age", "state"), [(1, "running"), (200, "dead")])
def test_heartbeats_tell_of_a_run_on_another_machine(tmp_path, age, state):
    path = make_run(tmp_path / "run", lock=ELSEWHERE)
    os.utime(path / "lock", (1e9, 1e9))
    beat(path, 0, age)
    assert current_condition(path).state == state


def test_heartbeats_tell_of_a_run_in_a_container_with_the_name_of_this_machine(tmp_path):
    path = make_run(tmp_path / "run", lock=(here()[0], NO_PROCESS))
    beat(path, 0, 0)
    assert current_condition(path).state == "running"


@pytest.mark.parametrize("lock", [ELSEWHERE, (here()[0], NO_PROCESS)])
def test_a_heartbeat_before_or_just_after_the_recorded_end_does_not_count(tmp_path, lock):
    now = time.time()
    end = {"ended": {"time": now - 3, "code": 75, "reason": "ended by the watchdog"}}
    path = make_run(tmp_path / "run", lock=lock, attempts=[end])
    os.utime(path / "lock", (1e9, 1e9))
    for age in (4, 2):  # a thread may send one while another ends the process
        beat(path, 0, age)
        assert current_condition(path).state == "failed"
    beat(path, 0, 0)  # it waits for a tracker
    assert current_condition(path).state == "running"


@pytest.mark.parametrize(("age", "state"), [(60, "running"), (3600, "dead")])
def test_without_heartbeats_the_last_sign_of_life_counts(tmp_path, age, state):
    path = make_run(tmp_path / "run", lock=ELSEWHERE)
    taken = time.time() - age
    os.utime(path / "lock", (taken, taken))
    assert current_condition(path).state == state


def test_a_rank_that_is_silent_hangs_the_run(tmp_path):
    path = make_run(tmp_path / "run", lock=here())
    taken = time.time() - 1
    os.utime(path / "lock", (taken, taken))
    beat(path, 0, 0)
    beat(path, 1, 900)  # of an earlier attempt with more ranks
    assert current_condition(path).state == "running"
    os.utime(path / "lock", (1e9, 1e9))
    path = make_run(tmp_path / "other", lock=ELSEWHERE)
    os.utime(path / "lock", (1e9, 1e9))
    beat(path, 0, 0)
    beat(path, 1, 900)
    assert current_condition(path).state == "hung"


def test_the_report_of_the_watchdog_tells_of_a_hang(tmp_path):
    path = make_run(tmp_path / "run", attempts=[{}, {}])
    report = path / "hangs" / "attempt-2" / "report.txt"
    report.parent.mkdir(parents=True)
    report.write_text("No progress for 600 s: rank 1 is frozen.\n  rank 0 ...\n")
    found = current_condition(path)
    assert (found.state, found.end.code) == ("hung", 75)
    assert found.end.reason == "No progress for 600 s: rank 1 is frozen."


@pytest.mark.parametrize(("at", "code"), [(1e9 + 40, 137), (1e9 - 40, None)])
def test_the_record_of_an_agent_tells_how_the_last_attempt_ended(tmp_path, at, code):
    path = make_run(tmp_path / "run")
    (path / "failures").mkdir()
    for number, value in (("0001", 64), ("0002", 137)):
        record = {"time": at, "exit_code": value, "what": "killed by SIGKILL"}
        (path / "failures" / f"{number}.json").write_text(json.dumps(record))
    found = current_condition(path)
    assert (found.end and found.end.code) == code
    assert found.state == ("failed" if code else "dead")


def test_a_run_without_an_attempt_is_new(tmp_path):
    assert current_condition(make_run(tmp_path / "run", attempts=[])).state == "new"


def test_how_an_attempt_ended_is_told_by_what_is_known(tmp_path):
    from train.runs.state import described_end

    run, killed = make_run(tmp_path / "run"), {"time": 1e9}
    assert described_end(run, 1, killed).startswith("no recorded end")
    (run / "failures").mkdir()
    record = {"time": 1e9 + 5, "exit_code": 75, "what": "rank 1 was lost"}
    (run / "failures/a.json").write_text(json.dumps(record))
    assert described_end(run, 1, killed) == "exit code 75: rank 1 was lost"
    (run / "hangs/attempt-1").mkdir(parents=True)
    (run / "hangs/attempt-1/report.txt").write_text("No progress for 5 s: rank 1.\n  rank 0\n")
    assert described_end(run, 1, killed) == "the watchdog ended it: No progress for 5 s: rank 1."
    assert described_end(run, 2, killed) == "exit code 75: rank 1 was lost"
    ended = {"ended": {"time": 1e9 + 9, "code": 143, "reason": "stopped at step 40"}}
    assert described_end(run, 1, killed | ended) == "exit code 143: stopped at step 40"


def test_the_end_of_each_attempt_is_that_of_its_own_time(tmp_path):
    attempts = [{"time": 1e9}, {"time": 1e9 + 100}, {"time": 1e9 + 200}, ended(0)]
    run = make_run(tmp_path / "run", attempts=attempts)
    (run / "failures").mkdir()
    for at, code in ((50, 137), (150, 71)):
        record = {"time": 1e9 + at, "exit_code": code, "what": f"ended with {code}"}
        (run / f"failures/{at:04}.json").write_text(json.dumps(record))
    # Of an agent that started no ranks, since other nodes did not join: there was no attempt.
    record = {"time": 1e9 + 90, "exit_code": 75, "what": "late", "first": {"rank": -1}}
    (run / "failures/0090.json").write_text(json.dumps(record))
    (run / "hangs/attempt-3").mkdir(parents=True)
    (run / "hangs/attempt-3/report.txt").write_text("No progress for 5 s: rank 1.\n")
    ends = ends_of(run, RunDirectory(run).attempts.by_number())
    assert {number: (end.code, end.reason) for number, end in ends.items()} == {
        1: (137, "ended with 137"),
        2: (71, "ended with 71"),
        3: (75, "No progress for 5 s: rank 1."),
        4: (0, "so it was"),
    }
