"""What happened to a run reaches its sinks as events."""

import json

import pytest

from tests.support.forked import run
from tests.support.runs import checkpoints

PLUGINS = """
import os
import signal

from train import Hook, Sink


class Events(Sink):
    def open(self):
        self.file = (self.run.directory / "events.txt").open("a")

    def event(self, step, text):
        print(step, text, file=self.file, flush=True)


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, facts):
        if facts.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Of a run whose first attempt skips a step and is stopped, and whose second one hung."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "event_plugins.py").write_text(PLUGINS)
    usual = ["length.steps=8", "track.sinks=[event_plugins:Events]", "track.wandb=disabled"]
    hooks = "hooks=[{use: event_plugins:StopAt, options: {step: 4}}]"
    where = directory / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory))
        run("fit", where, *usual, hooks, "task.nan_at_steps=[2]", expect=143)
        saved = checkpoints(where)[-1]
        lines = (where / "attempts.jsonl").read_text().splitlines()
        hung = {k: v for k, v in json.loads(lines[0]).items() if k != "ended"} | {"attempt": 2}
        with (where / "attempts.jsonl").open("a") as file:
            print(json.dumps(hung), file=file)
        (where / "hangs/attempt-2").mkdir(parents=True)
        report = "No progress for 600 s: rank 1 (node-b) is behind.\n  rank 0 on node-a\n"
        (where / "hangs/attempt-2/report.txt").write_text(report)
        run("fit", where, *usual, "--allow-changes")
    return saved, (where / "events.txt").read_text().splitlines()


def test_skipped_steps_and_preemptions_are_events(events):
    saved, told = events
    assert any("of the last steps skipped: loss or gradient norm not finite" in e for e in told)
    assert f"{saved} Stopped on request after step {saved}; it is saved." in told


def test_the_report_of_the_watchdog_is_an_event_of_the_next_attempt(events):
    saved, told = events
    assert (
        f"{saved} Attempt 3 starts after step {saved}; the attempt before: the watchdog ended it: "
        "No progress for 600 s: rank 1 (node-b) is behind." in told
    )
