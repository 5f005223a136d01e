"""W&B gets each event of a run once, in order, over attempts that are killed or stopped."""

import random
import re

import pytest

from train.data.ledger import Ledger
from train.data.order import SampleOrder
from train.track.event_log import EVENTS, EventLog, events_until, start_text
from train.track.metrics_file import MetricsFile
from train.track.wandb_rows import EVENT_TIME, Told, committed_steps, continued_rows


class Simulated:
    """A run whose attempts are killed at random moments. W&B has ``history``: rows that were sent
    shortly before a kill are lost."""

    def __init__(self, directory, seed):
        self.directory, self.random = directory, random.Random(seed)
        self.metrics, self.history, self.attempts = directory / "metrics.jsonl", [], 0
        self.committed, self.every = 0, self.random.choice([1, 1, 3, 5])
        self.told = []
        """What the attempts told, in order."""

    def last(self, name):
        return next((row.get(name, 0) for row in reversed(self.history)), 0)

    def rows(self, sent, until, attempts):
        told = Told(self.last(EVENT_TIME), self.last("attempt"))
        events = events_until(self.directory, attempts)
        return continued_rows(
            lambda row: sent.append(dict(row)), self.metrics, until, self.last("step"), told, events
        )

    def attempt(self, end=None):
        """Trains up to ``end``, or to a random step, where it is killed or stopped."""
        draw, start = self.random, self.committed
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
            for number in range(draw.choice([0, 0, 0, 0, 1, 2])):
                self.told.append(f"<{self.attempts}:{step}:{number}>")
                happens(step, self.told[-1])
            if step % self.every == 0 or step == end:
                file.log(step, {"train/loss": 1.0})
                calls.append(("add", step))
            file.advance(step + 1)
            if draw.random() < 0.1 or step == end:
                file.flush(step)
                self.committed = step
        sent = []
        if end is None and draw.random() < 0.7:
            self._take(self.rows(sent, start, self.attempts - 1), calls[: draw.randint(0, 60)])
            self.history += sent[: draw.randint(0, len(sent))]
            file.advance(self.committed + 1)
        else:
            rows = self.rows(sent, start, self.attempts - 1)
            self._take(rows, calls)
            rows.close()
            self.history += sent
            file.close()
            self.committed = max(self.committed, end or start)
        log.close()

    def _take(self, rows, calls):
        for kind, value in calls:
            if kind == "add":
                rows.advance(value)
                rows.add(value, {"train/loss": 2.0}, attempt=self.attempts)
            else:
                rows.event(value, attempt=self.attempts)

    def sync(self):
        """What `isorun sync` does for a run that has ended."""
        until, sent = max(committed_steps(self.metrics), default=0), []
        rows = self.rows(sent, until, self.attempts)
        rows.close(until, attempt=self.attempts)
        self.history += sent

    @property
    def events(self):
        found = " ".join(row["event"] for row in self.history if "event" in row)
        return re.findall(r"<[\d:]+>|Attempt \d+ starts after step \d+\.", found)


@pytest.mark.parametrize("seed", range(40))
def test_events_of_killed_attempts_are_told_once_in_order(tmp_path, seed):
    run = Simulated(tmp_path, seed)
    for _ in range(run.random.randint(1, 8)):
        run.attempt()
        if seed % 2 and run.random.random() < 0.4:
            run.sync()
        assert run.events == run.told[: len(run.events)], "in order, and each at most once"
    run.attempt(end=max(run.last("step"), run.committed) + 10)
    steps = [row["step"] for row in run.history]
    assert steps == sorted(set(steps))
    assert run.events == run.told
    for row in run.history if seed % 2 == 0 else ():  # a sync has all events in its last row
        for attempt, step in re.findall(r"<(\d+):(\d+):\d+>", row.get("event", "")):
            assert int(attempt) < row["attempt"] or int(step) <= row["step"]


def test_an_attempt_that_has_only_steps_of_w_and_b_is_told_by_the_next_one(tmp_path):
    """Attempt 1 is killed at step 50, W&B has all; attempt 2 at 40; attempt 3 goes on."""
    run = Simulated(tmp_path, 0)
    run.every = 1
    for number, (start, end) in enumerate([(0, 50), (20, 40), (20, 60)], start=1):
        log, sent = EventLog(tmp_path / EVENTS, number), []
        rows = run.rows(sent, start, number - 1)
        if number > 1:
            rows.event(log.append(start, f"{start_text(number, start)}."), attempt=number)
        for step in range(start + 1, end + 1):
            rows.add(step, {"train/loss": 1.0}, attempt=number)
        rows.event(log.append(end, f"Step {end} is a spike."), attempt=number)
        rows.advance(end + 1)
        run.history += sent
        log.close()
    assert [row["step"] for row in run.history] == list(range(1, 61))
    assert {row["step"]: row["event"] for row in run.history if "event" in row} == {
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
