"""A run to track, and sinks that fail."""

import logging
import sys

import pytest

from train.track.logs import setup_logging
from train.track.sinks import RunInfo
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker


def run_info(directory, **changes):
    values = {
        "id": "digits-20260101-000000-abcdef", "name": "digits", "directory": directory,
        "attempt": 1, "wandb_id": "digits-wandb-id", "config": {"optim": {"lr": 0.1}},
        "code": {"isorun": "0.1.0"}, "unit": "tokens", "total_steps": 100, "start_step": 0,
    }  # fmt: skip
    return RunInfo(**(values | changes))


class Recorder:
    """A sink that records its calls; calls ``behave`` with the name of each call first."""

    name = "the test's sink"

    def __init__(self, behave=lambda method: None):
        self.behave, self.calls = behave, []

    def __getattr__(self, method):
        def call(*arguments):
            self.calls.append((method, *arguments))
            return self.behave(method)

        return call

    def called(self, method):
        return [call[1:] for call in self.calls if call[0] == method]


@pytest.fixture(autouse=True)
def logging_as_it_was():
    root, train = logging.getLogger(), logging.getLogger("train")
    before = root.handlers[:], root.level, train.level
    stdout = sys.stdout.errors
    yield
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:], root.level, train.level = before
    logging.captureWarnings(False)
    sys.stdout.reconfigure(errors=stdout)


@pytest.fixture
def track(tmp_path):
    """Creates trackers with a log file in ``tmp_path``, and closes them at the end."""
    opened = []

    def make(sinks=(), *, rank=0, close_seconds=20.0, config=None, **changes):
        info = run_info(tmp_path, **changes)
        setup_logging(tmp_path, rank, info.attempt, "INFO")
        config = TrackConfig(**({"console": "quiet"} | (config or {})))
        tracker = Tracker(config, info, is_main=rank == 0, sinks=sinks, close_seconds=close_seconds)
        opened.append(tracker)
        return tracker

    yield make
    for tracker in opened:
        tracker.close()
