"""W&B gets each step of a run once, in order, over attempts that are killed (I4)."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("wandb")

from tests.support.forked import quick
from tests.support.runs import ROOT, metrics
from tests.support.wandb_server import WandbServer
from tests.track.conftest import run_info
from tests.track.wandb_file import WandbFile, history, offline_files, records
from train.track.event_log import Event
from train.track.track_config import TrackConfig
from train.track.wandb_log import (
    first_step,
    has_run,
    last_value,
    mark_uploaded,
    messages,
    synced_marker,
    transaction_logs,
    uploaded_value,
)
from train.track.wandb_rows import Rows
from train.track.wandb_sync import upload

ATTEMPT = """
import json, os, signal, sys, time
from pathlib import Path
from train.data.ledger import Ledger
from train.data.order import SampleOrder
from train.track.logs import setup_logging
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker
from tests.track.conftest import run_info
from tests.track.wandb_file import service

directory, values = Path(sys.argv[1]), json.loads(sys.argv[2])
info = run_info(directory, attempt=values["attempt"], start_step=values["start"])
config = TrackConfig(console="quiet", tensorboard=False, wandb=values["mode"])
setup_logging(directory, 0, info.attempt, "INFO")
Ledger(directory / "ledger.bin").begin_attempt(
    attempt=info.attempt, resume_step=info.start_step, resume_position=8 * info.start_step,
    order=SampleOrder(0, 100, True),
)
tracker = Tracker(config, info, is_main=True, close_seconds=80.0)
tracker.warn("the tracker is made")  # starts nothing
if values["evaluated"]:
    tracker.log(values["evaluated"], {"eval/loss": 9.0})
for step in range(values["start"] + 1, values["end"] + 1):
    tracker.log(step, {"train/loss": 1.0 / step + info.attempt})
    if step % 10 == 0:
        tracker.log(step, {"eval/loss": 2.0 / step})
        tracker.report(step, {"sample": f"at {step}"})
        tracker.flush(step)
    if step < values["end"] or not values["interrupted"]:
        tracker.progress(step + 1)
if values["interrupted"]:
    tracker.begin_evaluation(values["end"])
    tracker.close()
elif values["kill_after"] is None:
    tracker.summary({"loss": 0.5})
    tracker.close()
else:
    for _ in range(4):  # some seconds each
        tracker.wait_until_open()
    time.sleep(values["kill_after"])
    for process in (service(os.getpid()), os.getpid()):
        os.kill(process, signal.SIGKILL)
"""


class Run:
    """A run whose attempts are processes of their own."""

    def __init__(self, directory, environment=None):
        self.directory, self.environment, self.attempts = directory, environment or {}, 0

    def attempt(
        self, start, end, kill_after=None, mode="offline", interrupted=False, evaluated=None
    ):
        """Logs the steps after ``start`` up to ``end``, of which the multiples of ten are
        committed; ``kill_after``: seconds after which trainer and service are killed;
        ``interrupted``: a stop comes in the evaluation of the last step; ``evaluated``: the step
        whose evaluation is made first."""
        self.attempts += 1
        values = {"start": start, "end": end, "kill_after": kill_after, "mode": mode}
        values |= {"interrupted": interrupted, "evaluated": evaluated}
        words = [str(self.directory), json.dumps(values | {"attempt": self.attempts})]
        expect = 0 if kill_after is None else -9
        return self._run(quick([sys.executable, "-c", ATTEMPT, *words]), expect)

    def wandb_sync(self, *paths):
        command = [sys.executable, "-m", "wandb", "sync", *map(str, paths)]
        return self._run({"args": command, "env": dict(os.environ)}, 0)

    def _run(self, program, expect):
        clean = {k: v for k, v in program["env"].items() if "WANDB" not in k}
        clean |= {"HOME": str(self.directory), "WANDB_ERROR_REPORTING": "false"}
        clean["WANDB_DIR"] = str(self.directory)
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                program["args"], cwd=ROOT, env=clean | self.environment, stdout=output,
                stderr=subprocess.STDOUT, timeout=90, check=False,
            )  # fmt: skip
            output.seek(0)
            text = output.read()
        assert done.returncode == expect, text
        return text

    @property
    def offline_steps(self):
        return [
            row["step"]
            for path in offline_files(self.directory)
            for row in history(records(path, growing=True))
        ]


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def killed_offline(tmp_path_factory):
    """Killed three times: after W&B has written, at once, and after no commit of its own. Then
    stopped before the steps that W&B has."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.attempt(0, 25, kill_after=2.5)
    run.attempt(20, 38, kill_after=0.0)
    run.attempt(30, 34, kill_after=2.5)
    run.attempt(30, 33)
    run.attempt(30, 60)
    return run


def test_offline_files_have_each_step_once(killed_offline):
    assert killed_offline.offline_steps == list(range(1, 61))


def test_rows_of_an_earlier_attempt_win_and_lost_ones_come_from_metrics_jsonl(killed_offline):
    files = [
        history(records(path, growing=True)) for path in offline_files(killed_offline.directory)
    ]
    rows = {row["step"]: row for rows in files for row in rows}
    first = files[0][-1]["step"]
    assert 20 < first <= 25, "W&B had rows that were not committed"
    assert [rows[step]["attempt"] for step in range(1, first + 1)] == [1] * first
    committed = {row["step"]: row for row in metrics(killed_offline.directory)}
    again = {rows[step]["attempt"] for step in range(31, 35)}
    assert again <= {2, 3}, "the same again; the second attempt may have been too short for W&B"
    for step in [*range(first + 1, 31), *range(39, 61)]:
        assert rows[step]["train/loss"] == committed[step]["train/loss"]
        assert rows[step]["attempt"] == committed[step]["attempt"]
    assert rows[30]["eval/loss"] == pytest.approx(2.0 / 30)
    assert rows[30]["_timestamp"] == committed[30]["time"]
    assert rows[60]["sample"]["_type"] == "html-file", "one row with all that a step has"


def test_the_step_of_an_interrupted_evaluation_is_one_row(tmp_path):
    """The next attempt makes the evaluation, and sends all of the step."""
    run = Run(tmp_path)
    run.attempt(0, 15, interrupted=True)
    assert run.offline_steps == list(range(1, 15))
    run.attempt(15, 22, evaluated=15)
    assert run.offline_steps == list(range(1, 23))
    (row,) = [r for f in offline_files(tmp_path) for r in history(records(f)) if r["step"] == 15]
    assert (row["train/loss"], row["eval/loss"]) == (1.0 / 15 + 1, 9.0)


def test_a_sync_of_the_offline_files_tells_the_run_once(killed_offline, server):
    killed_offline.environment = server.environment
    killed_offline.wandb_sync(*offline_files(killed_offline.directory))
    assert server.runs["digits-wandb-id"].steps == list(range(1, 61))


def test_a_sync_sends_no_row_before_an_attempt_that_has_none(killed_offline, monkeypatch, tmp_path):
    """Later offline attempts have the rows."""
    directory = tmp_path / "run"
    shutil.copytree(killed_offline.directory, directory, symlinks=True)
    logs = transaction_logs(directory)
    assert any(first_step(log) is None for log in logs[1:-1])
    for log in logs:
        synced_marker(log).unlink(missing_ok=True)  # of another test

    def as_wandb(command, **_):
        synced_marker(Path(command[-1])).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    of_wandb = SimpleNamespace(run=as_wandb, TimeoutExpired=TimeoutError)
    monkeypatch.setattr("train.track.wandb_sync.subprocess", of_wandb)
    said = []
    info = run_info(directory, attempt=5, start_step=60)
    upload(info, TrackConfig(), said.append, seconds=1.0, exit_code=0)
    assert said == [f"{info.id}: uploaded {log.parent.name}." for log in logs]


def test_online_runs_that_are_killed_send_each_step_once(tmp_path, server):
    run = Run(tmp_path, server.environment)
    run.attempt(0, 25, kill_after=0.0, mode="online")  # before the client sends anything
    sent = server.runs["digits-wandb-id"].steps
    assert sent == list(range(1, len(sent) + 1))
    run.attempt(20, 30, mode="online")
    run.attempt(20, 45, kill_after=0.5, mode="online")
    run.attempt(40, 60, mode="online")
    history = server.runs["digits-wandb-id"].history
    assert [row["step"] for row in history] == list(range(1, 61))
    attempts = [row["attempt"] for row in history]
    assert attempts == sorted(attempts)
    assert events_in(history).count("the tracker is made") == 4


@pytest.mark.slow
def test_an_online_attempt_sends_what_offline_ones_have_not_uploaded(tmp_path, server):
    run = Run(tmp_path, server.environment)
    run.attempt(0, 25, kill_after=1.5)
    run.attempt(20, 40, mode="online")
    assert server.runs["digits-wandb-id"].steps == list(range(1, 41))
    (log,) = offline_files(tmp_path)
    assert synced_marker(log).exists()
    assert events_in(server.runs["digits-wandb-id"].history).count("the tracker is made") == 2
    run.wandb_sync(log)
    assert server.runs["digits-wandb-id"].steps == list(range(1, 41))


def test_the_last_step_of_a_log_is_found_from_its_end(killed_offline, tmp_path):
    for log in transaction_logs(killed_offline.directory):
        steps = [row["step"] for row in history(records(log, growing=True))]
        assert last_value(log, "step") == max(steps, default=None)
    whole = transaction_logs(killed_offline.directory)[-1].read_bytes()
    cut = tmp_path / "cut.wandb"
    found = set()
    for size in range(0, len(whole), 997):
        cut.write_bytes(whole[:size])
        found.add(last_value(cut, "step"))
    assert None in found
    assert found - {None} <= set(range(31, 61))
    with pytest.raises(ValueError, match="cut off or damaged"):
        list(messages(whole[:-3], growing=False))


def sent_by(sent, items):
    rows = []
    collected = Rows(rows.append, sent)
    for step, values in items:
        collected.add(step, values)
    collected.flush()
    return rows


def test_of_a_log_that_is_marked_only_the_rows_up_to_a_step_count(killed_offline, tmp_path):
    """W&B has, or gets, no others of it."""
    log = tmp_path / "run.wandb"
    log.write_bytes(transaction_logs(killed_offline.directory)[-1].read_bytes())
    attempts = [row["attempt"] for row in history(records(log))]
    steps = [row["step"] for row in history(records(log))]
    assert uploaded_value(log, "step") == steps[-1] == 60
    for step in (steps[0] - 1, steps[0], 50, 99):
        mark_uploaded(log, step)
        known = [s for s in steps if s <= step]
        assert uploaded_value(log, "step") == (known[-1] if known else None)
        assert uploaded_value(log, "attempt") == (attempts[len(known) - 1] if known else None)


def test_a_log_without_the_record_of_the_run_is_known(killed_offline, tmp_path):
    """W&B refuses it, and with it all that it is given beside it."""
    whole = offline_files(killed_offline.directory)[-1].read_bytes()
    start = len(next(messages(whole))) + 14
    log = tmp_path / "run-x.wandb"
    for size in (0, 3, 7, 9, start, start + 100):
        log.write_bytes(whole[:size])
        assert not has_run(log)
    log.write_bytes(whole)
    assert has_run(log)


def test_all_of_a_step_is_one_row():
    items = [(1, {"a": 1}), (1, {"b": 2}), (2, {"a": 3}), (4, {"a": 5})]
    assert sent_by(0, items) == [
        {"step": 1, "a": 1, "b": 2},
        {"step": 2, "a": 3},
        {"step": 4, "a": 5},
    ]
    assert sent_by(2, items) == [{"step": 4, "a": 5}]
    assert sent_by(1, items) == [{"step": 2, "a": 3}, {"step": 4, "a": 5}]


def happened(step, text, attempt=1, time=None):
    return Event(attempt, step, time, text)


def test_events_are_in_the_row_of_their_step_or_the_next_one():
    rows = []
    collected = Rows(rows.append, 5)
    collected.event(happened(3, "One."), attempt=1)
    collected.event(happened(3, "Two."), attempt=1)
    collected.add(6, {"a": 1}, attempt=1)
    collected.add(8, {"a": 2}, attempt=1)
    collected.event(happened(7, "Three."), attempt=1)
    collected.flush()
    assert rows == [
        {"step": 6, "attempt": 1, "event": "One. Two.", "a": 1},
        {"step": 8, "attempt": 1, "event": "Three.", "a": 2},
    ]


def events_in(rows):
    return " ".join(row["event"] for row in rows if "event" in row)


def test_each_attempt_has_its_events_once(killed_offline):
    """Also those that were killed before they sent a row, or that only repeated steps."""
    files = [
        history(records(path, growing=True)) for path in offline_files(killed_offline.directory)
    ]
    events = events_in(row for rows in files for row in rows)
    starts = {2: 20, 4: 30}  # those of attempts that send rows are logged by the training loop
    found = re.findall(r"Attempt (\d+) starts after step (\d+)\.", events)
    assert found == [(str(attempt), str(step)) for attempt, step in starts.items()]
    assert events.count("the tracker is made") == 5
    without_rows = WandbFile(offline_files(killed_offline.directory)[-2])
    assert without_rows.history == []
    assert without_rows.summary["event"] == "the tracker is made"
    assert events.endswith(
        "Attempt 4 starts after step 30. the tracker is made the tracker is made"
    )


def test_a_step_that_only_has_an_event_yet_is_left_to_the_next_attempt(killed_offline):
    rows = [
        row for path in offline_files(killed_offline.directory)
        for row in history(records(path, growing=True))
    ]  # fmt: skip
    assert {row["step"] for row in rows if "train/loss" not in row} == set()


def test_an_event_of_a_step_that_was_not_reached_is_left_to_the_next_attempt():
    for reached in (False, True):
        rows = []
        collected = Rows(rows.append, 5)
        collected.event(happened(3, "One."))
        collected.event(happened(4, "Two."))
        collected.add(5, {"b": 2})
        if reached:
            collected.add(6, {"a": 1})
        assert collected.close() == ("" if reached else "One. Two.")
        assert rows == ([{"step": 6, "event": "One. Two.", "a": 1}] if reached else [])


@pytest.mark.parametrize("committed", [6, 7])
def test_an_event_of_a_step_that_the_next_attempt_repeats_is_left_to_it(committed):
    """It has the metrics of the step."""
    rows = []
    collected = Rows(rows.append, 5)
    collected.event(happened(7, "One."))
    collected.event(happened(6, "Two."))
    collected.committed = committed
    assert collected.close() == ("" if committed == 7 else "One. Two.")
    assert rows == ([{"step": 7, "event": "One. Two."}] if committed == 7 else [])


def test_a_row_is_sent_when_its_step_is_over():
    rows = []
    collected = Rows(rows.append, 0)
    collected.add(3, {"a": 1})
    collected.advance(3)
    assert rows == []
    collected.advance(4)
    assert rows == [{"step": 3, "a": 1}]
    collected.advance(5)
    collected.flush()
    assert len(rows) == 1


FAULTS = {
    "500": lambda operation: 500,
    "500 of rows": lambda operation: 500 if operation == "file_stream" else None,
    "closed": lambda operation: "close",
    "hangs": lambda operation: "hang",
    "rows hang": lambda operation: "hang" if operation == "file_stream" else None,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_a_faulty_server_did_not_take_follow_later(tmp_path, server, fault):
    run = Run(tmp_path, server.environment)
    server.fault = FAULTS[fault]
    run.attempt(0, 30, mode="online")
    server.fault = None
    run.attempt(30, 40, mode="online")
    assert server.runs["digits-wandb-id"].steps == list(range(1, 41))
