"""The ledger accounts for all time of a run, through deaths and resumes."""

import json
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.goodput.simulated import Simulated
from train.files import NotRegularError
from train.goodput.clock import PhaseClock, process_age
from train.goodput.ledger import GoodputLedger
from train.goodput.phases import WORK
from train.goodput.read import read_goodput

LONG = 1e12  # seconds since the epoch at which no simulated run is in progress
SECONDS = st.floats(0.0, 50.0)
EVENTS = st.one_of(
    st.tuples(st.just("spend"), st.sampled_from(["restore", "compile", "evaluation"]), SECONDS),
    st.tuples(st.just("step"), SECONDS, SECONDS),
    st.tuples(st.just("save"), SECONDS),
    st.tuples(st.just("commit")),
)
ATTEMPTS = st.tuples(
    st.floats(0.0, 100.0),  # start-up
    st.lists(EVENTS, max_size=12),
    st.sampled_from(["killed", "killed while it writes", "failed"]),
    st.floats(0.0, 1000.0),  # until the next
)


@settings(max_examples=25)
@given(st.lists(ATTEMPTS, min_size=1, max_size=5))
def test_the_phases_sum_to_the_wall_time_through_any_deaths(attempts):
    with tempfile.TemporaryDirectory() as directory:
        run = Simulated(Path(directory))
        began, idle_after = run.now, 0.0
        for start_up, events, end, pause in attempts:
            run.idle(idle_after)
            run.begin(age=start_up)
            for kind, *values in events:
                if kind == "spend":
                    run.spend(*values)
                elif kind == "step":
                    run.take_step(values[0], values[1], values[0] / 2, 0.1)
                elif kind == "save":
                    run.save()
                    run.spend("checkpoint", values[0])
                else:
                    run.commit()
            if end == "failed":
                run.finish(75)
            else:
                run.die(torn=b'{"attempt":1,"sta' if "writes" in end else b"")
            idle_after = pause
        found = read_goodput(run.directory, now=LONG)
        assert found is not None
        last = run.now - run.written_at  # a kill at the end: nothing tells when it was
        assert found.wall == pytest.approx(run.now - last - began, abs=0.01)
        for name in ("start", "restore", "compile", "checkpoint", "evaluation"):
            assert run.truth[name] - run.unflushed - 0.01 <= found.seconds[name], name
            assert found.seconds[name] <= run.truth[name] + 0.01, name
        counted = sum(found.seconds[name] for name in WORK)
        assert counted == pytest.approx(run.kept, abs=0.01)
        worked = sum(run.truth[name] for name in WORK)
        assert counted + found.seconds["lost"] <= worked + 0.01
        assert counted + found.seconds["lost"] >= worked - run.unflushed - 0.01
        assert all(value >= 0 for value in found.seconds.values())
        assert sum(attempt.committed for attempt in found.attempts) == run.committed


@pytest.fixture
def run(tmp_path):
    return Simulated(tmp_path)


def steps(run, count, *, seconds=10.0):
    for _ in range(count):
        run.take_step(0.0, seconds / 2, seconds / 2, 0.0)


def test_steps_after_the_checkpoint_that_the_next_attempt_resumes_from_are_lost(run):
    run.begin()
    steps(run, 4)
    run.save()
    run.commit()
    steps(run, 3)
    run.flush()
    run.die()
    run.begin()
    steps(run, 5)
    run.save()
    run.commit()
    run.finish(0)
    found = read_goodput(run.directory)
    first, second = found.attempts
    assert (first.committed, first.lost, first.exit) == (4, 3, None)
    assert (second.committed, second.lost, second.exit) == (5, 0, 0)
    assert found.seconds["lost"] == pytest.approx(30)
    assert found.seconds["compute"] == pytest.approx(90)
    assert found.percent == pytest.approx(75)
    assert found.lost_steps == 3


def test_a_resume_from_an_older_checkpoint_loses_the_steps_of_several_attempts(run):
    """As after the newest checkpoints were damaged."""
    run.begin()
    for _ in range(2):
        steps(run, 2)
        run.save()
        run.commit()
    run.die()
    run.begin()
    steps(run, 2)
    run.save()
    run.commit()
    run.die()
    run.committed = 2
    run.begin()
    steps(run, 1)
    run.save()
    run.commit()
    run.finish(0)
    found = read_goodput(run.directory)
    assert [(a.committed, a.lost) for a in found.attempts] == [(2, 2), (0, 2), (1, 0)]
    assert found.seconds["lost"] == pytest.approx(40)


def test_a_killed_run_has_lost_what_its_newest_checkpoint_on_disk_lacks(run):
    run.begin()
    steps(run, 4)
    run.save()
    steps(run, 2)
    run.flush()
    run.die()  # right after a commit that the loop did not see
    assert read_goodput(run.directory, now=LONG).lost_steps == 6
    (run.directory / "checkpoints" / "step-000000000004").mkdir(parents=True)
    found = read_goodput(run.directory, now=LONG)
    assert found.lost_steps == 2
    assert found.seconds["lost"] == pytest.approx(20)


def test_nothing_is_lost_yet_while_the_run_is_in_progress(run):
    run.begin()
    steps(run, 4)
    run.flush()
    found = read_goodput(run.directory, now=run.now + 2)
    assert (found.running, found.lost_steps, found.seconds["compute"]) == (True, 0, 40)
    assert not read_goodput(run.directory, now=run.now + 60).running


def test_the_time_since_the_submission_is_queued_only_once(run):
    run.truth["queued"] = 30.0
    submitted = run.now - 30
    run.begin(age=5, submitted=submitted)
    run.finish(75)
    run.idle(100)
    run.begin(submitted=submitted)  # the scheduler starts the same job again
    run.finish(75)
    run.idle(20)
    submitted = run.now
    run.idle(7)
    run.begin(submitted=submitted)
    run.finish(0)
    found = read_goodput(run.directory)
    assert [a.seconds["queued"] for a in found.attempts] == pytest.approx([30, 0, 7])
    assert [a.seconds["idle"] for a in found.attempts] == pytest.approx([0, 100, 20])


def test_clocks_of_hosts_that_differ_give_no_negative_times(run):
    run.begin()
    steps(run, 1)
    run.finish(75)
    run.now -= 300  # rank 0 is on another host now
    run.begin(submitted=run.now + 50)
    run.finish(0)
    found = read_goodput(run.directory)
    assert min(found.seconds.values()) >= 0
    assert found.wall == pytest.approx(10)


def test_lines_that_are_damaged_or_not_of_a_ledger_are_ignored(run):
    run.begin()
    steps(run, 1)
    run.save()
    run.commit()
    run.finish(0)
    path = run.directory / "goodput.jsonl"
    good = json.loads(path.read_text().splitlines()[-1])
    wrong = [
        {"step": -1}, {"step": 1.5}, {"started": -1}, {"started": None}, {"seconds": []},
        {"seconds": {"compute": "1"}}, {"seconds": {"compute": -1.0}}, {"committed": 2**70},
        {"saves": [[1]]}, {"saves": 3}, {"saves": [[1, 2, 3, "4"]]}, {"exit": "0"},
        {"seconds": {"compute": float("nan")}}, {"submitted": []}, {"seconds": {"x": 10**400}},
    ]  # fmt: skip
    with path.open("ab") as file:
        file.writelines(json.dumps(good | change).encode() + b"\n" for change in wrong)
        file.write(b"\xff\n[]\n" + b"[" * 9000 + b"\n")
    assert read_goodput(run.directory).seconds["compute"] == pytest.approx(10)


def test_a_ledger_that_is_a_link_is_neither_read_nor_written(run, tmp_path):
    target = tmp_path / "elsewhere"
    target.touch()
    (run.directory / "goodput.jsonl").symlink_to(target)
    with pytest.raises(NotRegularError):
        read_goodput(run.directory)
    with pytest.raises(NotRegularError):
        run.begin()
    assert target.read_bytes() == b""


def test_what_a_full_disk_refuses_is_written_later(run, monkeypatch, caplog):
    run.begin()
    steps(run, 2)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("train.goodput.ledger.append_bytes", refuse)
        run.save()
        run.save()
    assert caplog.text.count("No space left") == 1
    run.commit()
    steps(run, 1)
    run.flush()
    run.die()
    found = read_goodput(run.directory, now=LONG)
    assert (found.attempts[0].committed, found.lost_steps) == (2, 1)
    assert found.seconds["lost"] == pytest.approx(10)


def test_the_thread_writes_at_a_save_and_ends_with_the_ledger(tmp_path):
    ledger = GoodputLedger(PhaseClock())
    ledger.open(tmp_path, 1, 0)
    ledger.saving(3)
    ledger.ended(0)
    ledger.close()
    assert "goodput" not in {thread.name for thread in threading.enumerate()}
    (attempt,) = read_goodput(tmp_path).attempts
    assert (attempt.exit, attempt.committed) == (0, 0)
    lines = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert [save[0] for line in lines for save in line.get("saves", [])] == [3]


def test_a_rank_without_a_ledger_writes_nothing(tmp_path):
    ledger = GoodputLedger(PhaseClock())
    ledger.saving(3)
    ledger.flush_soon()
    assert ledger.so_far() is None
    ledger.close()
    assert os.listdir(tmp_path) == []


def test_phases_nest_and_the_first_step_counts_as_compilation():
    now = [0.0]
    clock = PhaseClock(age=2.0, now=lambda: now[0], wall=lambda: 100.0 + now[0])

    def spend(phase, seconds):
        with clock.within(phase):
            now[0] += seconds

    clock.enter("compute")
    with clock.counted_as("compile"):
        spend("forward", 5)
        spend("wait", 1)
        now[0] += 4
    spend("data", 3)
    now[0] += 1
    spend("evaluation", 7)
    now[0] += 1
    expected = {"start": 2, "compile": 9, "wait": 1, "data": 3, "compute": 2, "evaluation": 7}
    assert {k: v for k, v in clock.totals().items() if v} == expected
    assert clock.elapsed == sum(expected.values())
    assert clock.started_at == 98.0


def test_the_age_of_the_process_is_that_of_the_system():
    import psutil

    # The system gives the time of its start in whole seconds only.
    age = psutil.time.time() - psutil.Process().create_time()
    assert process_age() == pytest.approx(age, abs=5)
