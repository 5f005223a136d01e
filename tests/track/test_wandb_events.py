"""W&B gets each event of a run once, in order, over attempts that are killed or stopped."""

import json
import random
import re
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.track.conftest import run_info
from train.data.ledger import Ledger
from train.data.order import SampleOrder
from train.exits import RetryError
from train.track import wandb_log, wandb_sync
from train.track.event_log import EVENTS, EventLog, events_until, start_text
from train.track.metrics_file import MetricsFile
from train.track.track_config import TrackConfig
from train.track.wandb_log import (
    is_offline,
    mark_uploaded,
    synced_marker,
    transaction_logs,
    uploaded_value,
)
from train.track.wandb_rows import EVENT_TIME, Told, committed_steps, continued_rows


class Simulated:
    """A run whose attempts are killed at random moments, offline or online.

    Each attempt has a log of W&B's (here: its rows as JSON); rows that were sent shortly before a
    kill are in none. ``server`` has the rows that were uploaded: in an online attempt, perhaps not
    the last ones of its log.
    """

    def __init__(self, directory, seed, modes, monkeypatch):
        self.directory, self.random, self.modes = directory, random.Random(seed), modes
        self.metrics, self.server, self.attempts = directory / "metrics.jsonl", [], 0
        self.committed, self.every = 0, self.random.choice([1, 1, 3, 5])
        self.told = []
        """What the attempts told, in order."""
        for name in ("first_step", "last_value", "has_run"):
            monkeypatch.setattr(wandb_sync, name, getattr(self, name))
        monkeypatch.setattr(wandb_log, "last_value", self.last_value)
        monkeypatch.setattr(wandb_sync, "WandbSink", self.sink)
        monkeypatch.setattr(wandb_sync, "_setup", lambda: None)
        of_wandb = SimpleNamespace(run=self.wandb_sync, TimeoutExpired=TimeoutError)
        monkeypatch.setattr(wandb_sync, "subprocess", of_wandb)

    @staticmethod
    def in_log(log):
        return json.loads(log.read_text())

    def first_step(self, log):
        return next((row["step"] for row in self.in_log(log)), None)

    def last_value(self, log, name, until=1_000_000):
        rows = [row for row in self.in_log(log) if row["step"] <= until]
        return rows[-1].get(name) if rows else None

    def has_run(self, log):
        return True

    def wandb_sync(self, command, **_):
        if self.random.random() < 0.8:
            self.server += self.in_log(Path(command[-1]))
            synced_marker(Path(command[-1])).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    def last(self, mode, name):
        if mode == "online":
            return next((row.get(name, 0) for row in reversed(self.server)), 0)
        logs = transaction_logs(self.directory)
        return max((uploaded_value(log, name) or 0 for log in logs), default=0)

    def rows(self, mode, sent, until, events):
        told = Told(self.last(mode, EVENT_TIME), self.last(mode, "attempt"))
        return continued_rows(
            lambda row: sent.append(dict(row)),
            self.metrics, until, self.last(mode, "step"), told, events,
        )  # fmt: skip

    def record(self, mode, sent, uploaded):
        """Keeps the rows of an attempt in its log, and some of them in W&B."""
        number = len(transaction_logs(self.directory))
        prefix = "offline-" if mode == "offline" else ""
        folder = self.directory / "wandb" / f"{prefix}run-{number:04d}"
        folder.mkdir(parents=True)
        (folder / "run.wandb").write_text(json.dumps(sent))
        if mode == "online":
            self.server += sent[:uploaded]

    def attempt(self, end=None):
        """Trains up to ``end``, or to a random step, where it is killed or stopped."""
        draw, start, mode = self.random, self.committed, self.random.choice(self.modes)
        self.attempts += 1
        Ledger(self.directory / "ledger.bin").begin_attempt(
            attempt=self.attempts, resume_step=start, resume_position=8 * start,
            order=SampleOrder(0, 100, True),
        )  # fmt: skip
        if self.attempts > 1:
            self.told.append(f"{start_text(self.attempts, start)}.")
        if end is None and draw.random() < 0.15:
            return  # killed before it told anything
        log = EventLog(self.directory / EVENTS, self.attempts)
        file = MetricsFile(self.metrics, start_step=start, attempt=self.attempts)
        calls = []  # of the sink

        def happens(step, text):
            calls.append(("event", log.append(step, text)))

        if self.attempts > 1:
            happens(start, self.told[-1])
        for step in range(start + 1, (end or start + draw.randint(0, 25)) + 1):
            is_over = draw.random() < 0.95  # else an error ends the attempt before the log
            for number in range(draw.choice([0, 0, 0, 0, 1, 2])):
                self.told.append(f"<{self.attempts}:{step}:{number}>")
                happens(step, self.told[-1])
            if end is None and not is_over:
                break
            if step % self.every == 0 or step == end:
                file.log(step, {"train/loss": 1.0})
                calls.append(("add", step))
            file.advance(step + 1)
            if draw.random() < 0.1 or step == end:
                file.flush(step)
                self.committed = step
        log.close()
        file.close()
        is_killed = end is None and draw.random() < 0.7
        if is_killed and draw.random() < 0.2:
            return  # before W&B was there
        for offline in transaction_logs(self.directory) if mode == "online" else ():
            if is_offline(offline) and not synced_marker(offline).exists():
                mark_uploaded(offline, max(start, self.last(mode, "step")))
        sent = []
        rows = self.rows(mode, sent, start, run_info(
            self.directory, attempt=self.attempts, start_step=start
        ).events())  # fmt: skip
        for kind, value in calls[: draw.randint(0, 60) if is_killed else None]:
            if kind == "add":
                rows.advance(value)
                rows.add(value, {"train/loss": 2.0}, attempt=self.attempts)
            else:
                rows.event(value, attempt=self.attempts)
        if is_killed:
            sent = sent[: draw.randint(0, len(sent))]
            self.record(mode, sent, draw.randint(0, len(sent)))
        else:
            if end is not None or draw.random() < 0.5:  # else an error ends it
                self.committed = max([start, *committed_steps(self.metrics)])
            rows.committed = self.committed
            rows.close()
            self.record(mode, sent, len(sent))

    def sink(self, run, config, **_):
        """What stands for the sink in `isorun sync`."""
        return SimpleNamespace(
            catch_up=partial(self.catch_up, run), send_checkpoints=lambda *_, **__: False
        )

    def catch_up(self, run, exit_code, events):
        sent = []
        rows = self.rows("online", sent, run.start_step, events)
        rows.close(run.start_step, attempt=run.attempt)
        uploaded = len(sent) if self.random.random() < 0.8 else self.random.randint(0, len(sent))
        self.record("online", sent, uploaded)
        if uploaded < len(sent):
            raise ConnectionError("the server is gone")
        return rows

    def sync(self):
        """As the command `isorun sync` does; again and again where the server fails."""
        until = max(committed_steps(self.metrics), default=0)
        info = run_info(self.directory, attempt=self.attempts, start_step=until)
        said = []
        while True:
            try:
                wandb_sync.upload(info, TrackConfig(), said.append, seconds=1.0, exit_code=0)
                return said
            except RetryError:
                if self.random.random() < 0.2:
                    return None  # given up

    @property
    def events(self):
        """What W&B has of the events."""
        found = " ".join(row["event"] for row in self.server if "event" in row)
        return re.findall(r"<[\d:]+>|Attempt \d+ starts after step \d+\.", found)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("modes", [["offline"], ["online"], ["offline", "online"]], ids="-".join)
def test_rows_and_events_of_killed_attempts_are_told_once_in_order(
    tmp_path, monkeypatch, seed, modes
):
    run = Simulated(tmp_path, seed, modes, monkeypatch)
    for _ in range(run.random.randint(1, 8)):
        run.attempt()
        if seed % 2 and run.random.random() < 0.4:
            run.sync()
        assert run.events == run.told[: len(run.events)], "in order, and each at most once"
    known = [row["step"] for row in run.server]
    known += [row["step"] for log in transaction_logs(tmp_path) for row in run.in_log(log)]
    run.attempt(end=max([run.committed, *known]) + 10)
    while run.sync() is None:
        pass
    steps = [row["step"] for row in run.server]
    assert steps == sorted(set(steps))
    with_metrics = {row["step"] for row in run.server if "train/loss" in row}
    assert set(committed_steps(run.metrics)) <= with_metrics
    assert run.events == run.told
    assert run.sync() == [f"{run_info(tmp_path).id}: W&B has all of its rows."]
    for row in run.server if seed % 2 == 0 else ():  # an earlier sync has all in its last row
        for attempt, step in re.findall(r"<(\d+):(\d+):\d+>", row.get("event", "")):
            assert int(attempt) < row["attempt"] or int(step) <= row["step"]


def test_an_attempt_that_has_only_steps_of_w_and_b_is_told_by_the_next_one(tmp_path):
    """Attempt 1 is killed at step 50, W&B has all; attempt 2 at 40; attempt 3 goes on."""
    history = []

    def last(name):
        return next((row.get(name, 0) for row in reversed(history)), 0)

    for number, (start, end) in enumerate([(0, 50), (20, 40), (20, 60)], start=1):
        log, sent = EventLog(tmp_path / EVENTS, number), []
        rows = continued_rows(
            lambda row, sent=sent: sent.append(row), tmp_path / "metrics.jsonl", start,
            last("step"), Told(last(EVENT_TIME), last("attempt")), events_until(tmp_path, number - 1),
        )  # fmt: skip
        if number > 1:
            rows.event(log.append(start, f"{start_text(number, start)}."), attempt=number)
        for step in range(start + 1, end + 1):
            rows.add(step, {"train/loss": 1.0}, attempt=number)
        rows.event(log.append(end, f"Step {end} is a spike."), attempt=number)
        rows.advance(end + 1)
        history += sent
        log.close()
    assert [row["step"] for row in history] == list(range(1, 61))
    assert {row["step"]: row["event"] for row in history if "event" in row} == {
        50: "Step 50 is a spike.",
        51: "Attempt 2 starts after step 20. Step 40 is a spike. Attempt 3 starts after step 20.",
        60: "Step 60 is a spike.",
    }


def test_events_keep_their_order_if_a_clock_goes_back(tmp_path, monkeypatch):
    for number, now in enumerate([2000.0, 1000.0, 1000.0], start=1):
        monkeypatch.setattr("time.time", lambda now=now: now)
        log = EventLog(tmp_path / EVENTS, number)
        times = [log.append(3, f"{number}").time, log.append(3, "again").time]
        log.close()
        assert times == sorted(set(times))
    found = list(events_until(tmp_path, 3))
    assert [event.time for event in found] == sorted({event.time for event in found})
    assert [event.text for event in found] == ["1", "again", "2", "again", "3", "again"]


@pytest.mark.parametrize("left", [b'{"attempt": 1, "st', b"\xff\n", b"[]\n", b'{"attempt": "1"}\n'])
def test_a_damaged_line_hides_no_event(tmp_path, left):
    for number in (1, 2):
        log = EventLog(tmp_path / EVENTS, number)
        log.append(number, f"of {number}")
        log.close()
        with (tmp_path / EVENTS).open("ab") as file:
            file.write(left)
    assert [(e.attempt, e.step, e.text) for e in events_until(tmp_path, 2)] == [
        (1, 1, "of 1"), (2, 2, "of 2"),
    ]  # fmt: skip
    assert len(list(events_until(tmp_path, 1))) == 1
