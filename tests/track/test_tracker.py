"""The tracker: no sink stops or blocks the training."""

import errno
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.support.runs import ROOT
from tests.track.conftest import Recorder, run_info
from train.track import background, metrics_file


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def log(directory, rank=0):
    return (directory / "logs" / f"rank-{rank}.log").read_text()


def drive(tracker):
    """All calls that a run makes."""
    for step in (1, 2, 3):
        tracker.progress(step)
        tracker.log(step, {"train/loss": float(step)})
        tracker.histograms(step, {"weights/w": np.ones(3)})
    tracker.report(3, {"sample": "text", "drawn": np.zeros((3, 2, 2), dtype=np.float32)})
    tracker.info("said")
    tracker.flush(3)
    tracker.summary({"loss": 3.0})
    tracker.close()


def test_every_sink_gets_everything_in_order(track):
    sinks = [Recorder(), Recorder()]
    drive(track(sinks))
    for sink in sinks:
        methods = [call[0] for call in sink.calls]
        assert methods == [
            "load", "open", *["log", "histograms", "advance"] * 2, "log", "histograms",
            "report", "summary", "close",
        ]  # fmt: skip
        assert sink.called("advance") == [(2,), (3,)]
        assert sink.called("log") == [(step, {"train/loss": float(step)}) for step in (1, 2, 3)]
        ((step, items),) = sink.called("report")
        assert (step, items["sample"], items["drawn"].dtype) == (3, "text", np.uint8)
        assert sink.called("summary") == [({"loss": 3.0},)]


def test_warnings_are_events_and_those_of_the_start_wait_for_the_first_item(track):
    sink = Recorder()
    tracker = track([sink], start_step=4)
    tracker.warn("At the start, with --token=hunter2hunter2")
    time.sleep(0.05)
    assert sink.calls == [], "the imports of sinks would delay the start"
    tracker.progress(5)
    tracker.log(5, {"train/loss": 1.0})
    tracker.event("Later.")
    tracker.close()
    assert sink.called("event") == [(4, "At the start, with --token=***"), (5, "Later.")]


def test_what_a_sink_does_to_its_arguments_does_not_reach_the_others(track, tmp_path):
    class Clearing(Recorder):
        def __getattr__(self, method):
            return lambda *arguments: [a.clear() for a in arguments if isinstance(a, dict)] and None

    good = Recorder()
    drive(track([Clearing(), good]))
    assert good.called("log") == [(step, {"train/loss": float(step)}) for step in (1, 2, 3)]
    assert good.called("summary") == [({"loss": 3.0},)]
    assert set(good.called("report")[0][1]) == {"sample", "drawn"}
    assert [row["train/loss"] for row in rows(tmp_path)] == [1.0, 2.0, 3.0]


def test_an_evaluation_that_is_interrupted_is_told_to_the_sinks(track):
    for begins, ends, expected in ((False, False, []), (True, True, []), (True, False, [(5,)])):
        sink = Recorder()
        tracker = track([sink], start_step=4)
        tracker.progress(5)
        tracker.log(5, {"train/loss": 1.0})
        if begins:
            tracker.begin_evaluation(5)
        if ends:
            tracker.end_evaluation()
        tracker.close()
        assert sink.called("interrupted") == expected
        assert sink.calls[-1] == ("close",)


@pytest.mark.parametrize(
    "where", ["load", "open", "log", "report", "histograms", "summary", "close"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_sink_that_raises_is_dropped_with_one_warning(track, tmp_path, capfd, where, error):
    def behave(method):
        if method == where:
            raise error("it broke")

    broken, good = Recorder(behave), Recorder()
    drive(track([broken, good]))
    assert [call[0] for call in broken.calls][-2:] == [where, "abandon"], (
        "a dropped sink is called again"
    )
    assert len(broken.called(where)) == 1
    assert [call[0] for call in good.calls][-2:] == ["summary", "close"]
    assert len(good.called("log")) == 3
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    (line,) = capfd.readouterr().err.splitlines()
    assert "the test's sink failed" in line
    assert "it broke" in line
    assert "Traceback" in log(tmp_path), "the log file must have the details"


def test_the_message_of_open_is_printed(track, capfd):
    sink = Recorder(lambda method: "lies there" if method == "open" else None)
    drive(track([sink], config={"console": "plain"}))
    assert "lies there" in capfd.readouterr().out.splitlines()


def test_the_message_of_open_comes_before_the_last_lines(track, capfd):
    let_go = threading.Event()
    sink = Recorder(lambda method: "lies there" if method == "open" and let_go.wait(30) else None)
    tracker = track([sink], config={"console": "plain"})
    tracker.log(1, {"train/loss": 1.0})
    threading.Timer(0.2, let_go.set).start()
    tracker.wait_until_open()
    tracker.info("Finished")
    tracker.close()
    lines = capfd.readouterr().out.splitlines()
    assert lines.index("lies there") < lines.index("Finished")


@pytest.mark.parametrize("where", ["load", "open", "log", "close"])
def test_a_hanging_sink_does_not_block_the_training(track, tmp_path, capfd, where):
    let_go = threading.Event()
    sink = Recorder(lambda method: let_go.wait() if method == where else None)
    tracker = track([sink], close_seconds=0.3)
    started = time.perf_counter()
    drive(tracker)
    seconds = time.perf_counter() - started
    let_go.set()
    assert 0.3 <= seconds < 1.5
    assert len(sink.called("abandon")) == 1
    assert "Timed out after 0.3 s waiting for the tracking sinks" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_hanging_sink_does_not_delay_others(track, capfd):
    let_go = threading.Event()
    hanging = Recorder(lambda method: let_go.wait() if method == "open" else None)
    hanging.name = "the one that hangs"
    good = Recorder()
    drive(track([hanging, good], close_seconds=0.3))
    let_go.set()
    assert len(good.called("log")) == 3
    assert [call[0] for call in good.calls][-2:] == ["summary", "close"]
    assert good.called("abandon") == []
    (line,) = capfd.readouterr().err.splitlines()
    assert "(the one that hangs)" in line


def test_sinks_get_the_exit_code(track):
    stopped, failed, idle = Recorder(), Recorder(), Recorder()
    for sink, code in ((stopped, 143), (failed, 65)):
        tracker = track([sink])
        tracker.log(1, {"train/loss": 1.0})
        tracker.fail(code) if sink is failed else tracker.end(code)
        tracker.close()
    tracker = track([idle])
    tracker.end(0)
    tracker.close()
    assert (stopped.called("fail"), stopped.called("end")) == ([], [(143,)])
    assert (failed.called("fail"), failed.called("end")) == ([(65,)], [(65,)])
    assert [call[0] for call in failed.calls][-3:] == ["fail", "end", "close"]
    assert idle.calls == [], "a sink that got nothing is not opened"


def test_close_waits_for_queued_items(track, capfd):
    sink = Recorder(lambda method: time.sleep(0.05) if method == "log" else None)
    drive(track([sink]))
    assert len(sink.called("log")) == 3
    assert len(sink.called("close")) == 1
    assert capfd.readouterr().err == ""


def test_a_hanging_sink_does_not_block_the_exit(tmp_path):
    code = """
import sys, time
from pathlib import Path
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker
from tests.track.conftest import Recorder, run_info
sink = Recorder(lambda method: None if method == "abandon" else time.sleep(600))
tracker = Tracker(TrackConfig(console="quiet"), run_info(Path(sys.argv[1])), is_main=True,
                  sinks=[sink], close_seconds=0.1)
tracker.log(1, {"train/loss": 1.0})
tracker.close()
sys.exit(75)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=20, check=False
    )
    assert done.returncode == 75


def test_a_slow_sink_loses_histograms_first_and_no_event(track, capfd, monkeypatch):
    monkeypatch.setattr(background, "_ITEMS", 20)
    let_go, opened = threading.Event(), threading.Event()

    def behave(method):
        if method == "open":
            opened.set()
            let_go.wait()

    sink = Recorder(behave)
    tracker = track([sink])
    tracker.log(0, {"train/loss": 0.0})
    opened.wait()
    for step in range(1, 25):
        tracker.log(step, {"train/loss": 1.0})
        if 10 <= step < 14:
            tracker.histograms(step, {"w": np.ones(3)})
        if step == 2:
            tracker.event("It happened.")
    assert "are too slow" in capfd.readouterr().err, "there is no immediate warning"
    let_go.set()
    tracker.close()
    assert sink.called("histograms") == []
    assert [step for step, _ in sink.called("log")] == list(range(6, 25)), (
        "the oldest rows must be dropped next"
    )
    assert sink.called("event") == [(0, "It happened.")]
    assert "too slow; 4 x histograms, 6 x log dropped" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_events_that_cannot_be_written_reach_the_sinks(track, tmp_path, capfd, kind):
    (tmp_path / "of others").write_text("mine")
    if kind == "link":
        (tmp_path / "events.jsonl").symlink_to(tmp_path / "of others")
    else:
        (tmp_path / "events.jsonl").mkdir()
    sink = Recorder()
    tracker = track([sink])
    assert "events.jsonl cannot be opened, so events are not written" in capfd.readouterr().err
    tracker.event("It happened.")
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert sink.called("event") == [(0, "It happened.")]
    assert (tmp_path / "of others").read_text() == "mine"
    assert list(run_info(tmp_path, attempt=2).events()) == []


def test_events_are_in_a_file_before_a_sink_has_them(track, tmp_path):
    let_go = threading.Event()
    tracker = track([Recorder(lambda method: let_go.wait() if method == "open" else None)])
    tracker.log(1, {"train/loss": 1.0})
    tracker.progress(1)
    tracker.warn("It happened, with --token=abcdef123456.")
    (event,) = run_info(tmp_path, attempt=2).events()
    assert (event.attempt, event.step, event.text) == (1, 1, "It happened, with --token=***")
    let_go.set()


def test_queued_histograms_have_a_memory_limit(track, capfd, monkeypatch):
    monkeypatch.setattr(background, "_BYTES", 1000)
    let_go = threading.Event()
    sink = Recorder(lambda method: let_go.wait() if method == "open" else None)
    tracker = track([sink])
    for step in range(1, 11):
        tracker.log(step, {"train/loss": 1.0})
        tracker.histograms(step, {"w": np.ones(50)})  # 400 bytes
    tracker.histograms(11, {"w": np.ones(5000)})  # alone larger than the limit
    let_go.set()
    tracker.close()
    assert [step for step, _ in sink.called("histograms")] == [11]
    assert len(sink.called("log")) == 10
    assert "too slow; 10 x histograms dropped" in capfd.readouterr().err


def test_a_full_disk_is_reported_once_and_rows_are_written_later(
    track, tmp_path, capfd, monkeypatch
):
    tracker = track()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    append = metrics_file.append_bytes
    monkeypatch.setattr(metrics_file, "append_bytes", full)
    for step in (1, 2, 3):
        tracker.progress(step)
        tracker.log(step, {"train/loss": 1.0})
    tracker.flush(3)
    assert capfd.readouterr().err.count("No space left") == 1
    monkeypatch.setattr(metrics_file, "append_bytes", append)
    tracker.log(4, {"train/loss": 1.0})
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_metrics_file_that_cannot_be_opened_is_reported(track, tmp_path, capfd):
    (tmp_path / "metrics.jsonl").mkdir()
    sink = Recorder()
    drive(track([sink]))
    assert "metrics.jsonl cannot be opened" in capfd.readouterr().err
    assert len(sink.called("log")) == 3


def test_damaged_lines_are_reported(track, tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    track(start_step=1, attempt=2)
    assert "1 line(s) of" in capfd.readouterr().err
    assert rows(tmp_path) == [{"step": 1}]


def test_a_value_that_is_not_a_number_is_not_logged(track, tmp_path, capfd):
    sink = Recorder()
    tracker = track([sink])
    for step in (1, 2):
        tracker.log(step, {"a": torch.tensor(2.0), "b": np.float32(3), "c": "four", "d": None})
    tracker.close()
    assert sink.called("log")[0] == (1, {"a": 2.0, "b": 3.0})
    assert [(row["a"], row["b"], "c" in row) for row in rows(tmp_path)] == [(2.0, 3.0, False)] * 2
    err = capfd.readouterr().err
    assert err.count("The metric 'c' is 'four', which is not a number") == 1
    assert err.count("The metric 'd' is None, which is not a number") == 1


def test_texts_and_images_can_be_reported(track, capfd):
    sink = Recorder()
    tracker = track([sink], config={"console": "plain"})
    tracker.report(5, {
        "text": "bell \a, r\r\nn, lone \ud800, tab\t",
        "tensor": torch.full((3, 2, 2), 0.5, dtype=torch.float16),
        "grey": np.zeros((2, 2)), "number": 7, "empty": torch.ones(3, 0, 2),
    })  # fmt: skip
    tracker.report(6, {})
    tracker.close()
    ((_, items),) = sink.called("report")
    assert items.keys() == {"text", "tensor"}
    assert items["text"] == "bell \N{REPLACEMENT CHARACTER}, r\nn, lone ?, tab\t"
    assert items["tensor"].tolist() == [[[128] * 2] * 2] * 3
    out, err = capfd.readouterr()
    assert "text at step 5:\nbell" in out
    assert "report 'grey' is neither text nor an image" in err
    assert "report 'number' is neither" in err


def test_other_ranks_write_nothing_but_their_log(track, tmp_path, capfd):
    sink = Recorder()
    tracker = track([sink], rank=1)
    drive(tracker)
    tracker.warn("careful")
    assert sink.calls == []
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "logs/rank-1.log"
    ]
    assert "INFO attempt 1 rank 1 train: said" in log(tmp_path, 1)
    assert "WARNING attempt 1 rank 1 train: careful" in log(tmp_path, 1)
    assert capfd.readouterr() == ("", "")


def test_progress_is_cheap(track):
    tracker = track()
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for step in range(10_000):
            tracker.progress(step)
        rounds.append((time.perf_counter() - started) / 10_000)
    assert min(rounds) < 5e-6


def test_importing_is_light():
    code = """
import sys
import train.track.track_config, train.track.tracker, train.track.logs, train.track.console
import train.track.metrics_file, train.track.sinks, train.track.tensorboard
import train.track.wandb_sink, train.track.background
print(sorted({"torch", "numpy", "wandb", "tensorboard", "rich"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_nothing_heavy_is_imported_before_the_first_row(tmp_path):
    code = """
import sys
from pathlib import Path
from train.track.track_config import TrackConfig
from train.track.tracker import Tracker
from tests.track.conftest import run_info
heavy = {"wandb", "tensorboard", "rich"}
tracker = Tracker(TrackConfig(console="plain"), run_info(Path(sys.argv[1])), is_main=True)
tracker.info("begins")
tracker.progress(1)
assert not heavy & set(sys.modules), sys.modules.keys() & heavy
tracker.close()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


def import_it(done):
    importlib.import_module("slow_to_import")
    done.set()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_data_worker_forked_during_an_import_can_import_the_same(track, tmp_path, monkeypatch):
    """Otherwise it deadlocks on an import lock that only the parent can release."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    importing = threading.Event()

    def behave(method):
        if method == "load":
            importing.set()
            importlib.import_module("slow_to_import")

    tracker = track([Recorder(behave)])
    tracker.log(1, {"train/loss": 1.0})
    importing.wait()
    context = multiprocessing.get_context("fork")
    done = context.Event()
    worker = context.Process(target=import_it, args=(done,))
    worker.start()
    worker.join(10)
    hangs = worker.is_alive()
    if hangs:
        os.kill(worker.pid, 9)
        worker.join()
    assert not hangs
    assert done.is_set()
