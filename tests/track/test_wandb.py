"""The W&B sink, checked with the files of offline runs, each in its own process."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

pytest.importorskip("wandb")

from tests.support.forked import quick
from tests.support.lanes import slow
from tests.support.runs import ROOT
from tests.track.conftest import run_info
from tests.track.wandb_file import WandbFile, offline_files
from train.files import NotRegularError
from train.track.track_config import TrackConfig
from train.track.wandb_sink import WandbSink, wandb_mode

MADE = """
import json, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from train.track.track_config import TrackConfig
from train.track.logs import setup_logging
from train.track.tracker import Tracker
from train.track.wandb_sink import WandbSink
from tests.track.conftest import run_info
from tests.track.wandb_file import offline_files, service

def hooks():
    return sys.exit, sys.excepthook, *map(signal.getsignal, signal.valid_signals())

directory, values = Path(sys.argv[1]), json.loads(sys.argv[2])
before = hooks()
info = run_info(directory, **values.get("run", {}))
if "patch" in values:
    (directory / "code").mkdir(exist_ok=True)
    patch = directory / "code" / f"attempt-{info.attempt}.diff"
    patch.write_text(values["patch"])
    info = replace(info, changes=lambda: patch)
config = TrackConfig(console="plain", tensorboard=False, **values.get("track", {}))
sink = WandbSink(info, config, init_seconds=values.get("init_seconds", 20.0))
setup_logging(directory, 0, info.attempt, "INFO")
tracker = Tracker(config, info, is_main=True, sinks=[sink], close_seconds=values.get("close", 20.0))
for step in range(info.start_step + 1, info.start_step + 4):
    tracker.progress(step)
    tracker.log(step, {"train/loss": 1.0 / step, "eval/none": float("nan")})
image = np.zeros((3, 4, 6)); image[0] = 1.0
tracker.report(info.start_step + 3, {"sample": "<x>&", "drawn": image})
tracker.histograms(info.start_step + 3, {"weights/w": np.arange(10.0)})
tracker.progress(info.start_step + 4)  # the row of the last step is complete
(directory / "logged").write_text(str(time.time()))
tracker.summary({"loss": 0.125, "goodput/percent": 62.5})
if "signal_to_service" in values:
    while not offline_files(directory) or (values.get("opened", True) and hooks() != before):
        time.sleep(0.01)  # wandb replaces hooks while it opens the run
    time.sleep(values.get("wait", 0.3 if values.get("opened", True) else 0.0))
    number = service(os.getpid())
    (directory / "service").write_text(str(number))
    os.kill(number, values["signal_to_service"])
    for late in range(3):
        time.sleep(0.1)
        tracker.log(100 + late, {"train/loss": 0.0})
if "fail" in values:
    tracker.fail(values["fail"])
started = time.perf_counter()
tracker.close()
closed = {"seconds": time.perf_counter() - started, "service": service(os.getpid())}
(directory / "closed.json").write_text(json.dumps(closed))
assert before == hooks()
sys.exit(int(values.get("exit", 0)))
"""


SECRET_WORDS = ["--password", "hunter2", "--url=https://me:hunter2@host"]


def track(directory, expect=0, env=None, **values):
    """An attempt of a run; its environment has only the given W&B variables."""
    words = [str(directory), json.dumps(values), *SECRET_WORDS]
    program = quick([sys.executable, "-c", MADE, *words])
    clean = {k: v for k, v in program["env"].items() if "WANDB" not in k}
    home = directory / "home"
    home.mkdir(exist_ok=True)
    clean |= {"HOME": str(home), **(env or {})}
    # Files, since a pipe ends only when W&B's service has ended as well.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(
            program["args"], cwd=ROOT, env=clean, stdout=out, stderr=err, timeout=60, check=False,
        )  # fmt: skip
        for stream in (out, err):
            stream.seek(0)
        done.stdout, done.stderr = out.read(), err.read()
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two attempts of one run, and their output."""
    directory = tmp_path_factory.mktemp("my runs")
    tags = {"wandb_tags": ["quick"], "wandb_project": "mine"}
    config = {"optim": {"lr": 0.1}, "data": {"url": "https://me:hunter2@host"}}
    first = track(directory, track=tags, run={"config": config}, patch="diff --git a/x b/x\n")
    second = track(
        directory, run={"attempt": 2, "start_step": 2}, track=tags, exit=7, expect=7, fail=70
    )
    return directory, first, second


@pytest.fixture(scope="module")
def files(twice):
    return [WandbFile(path) for path in offline_files(twice[0])]


def test_both_attempts_are_one_run(files):
    assert len(files) == 2
    for file in files:
        assert file.run.run_id == "digits-wandb-id"
        assert file.run.display_name == "digits"
        assert file.run.run_group == "digits-20260101-000000-abcdef"
        assert file.run.project == "mine"
        assert list(file.run.tags) == ["quick"]


def test_an_attempt_that_fails_is_reported_with_its_exit_code(files):
    assert [file.exit_code for file in files] == [[0], [70]]


def test_the_config_and_the_version_are_logged(files):
    assert files[0].config["optim"] == {"lr": 0.1}
    assert files[0].config["code"] == {"isorun": "0.1.0"}


def test_the_changes_of_the_code_are_a_file_of_the_run(twice, files):
    kept = [path.parent / "files/code" for path in offline_files(twice[0])]
    copy = kept[0] / "attempt-1.diff"
    assert not copy.is_symlink(), "the run directory may be moved before it is uploaded"
    assert copy.read_text() == "diff --git a/x b/x\n"
    sent = [f.path for r in files[0].records if r.HasField("files") for f in r.files.files]
    assert "code/attempt-1.diff" in sent
    assert not kept[1].exists()


def test_secrets_of_the_command_line_and_the_config_are_not_recorded(twice):
    found = [path for path in twice[0].rglob("*") if path.is_file() and path.suffix != ".py"]
    assert any(path.suffix == ".wandb" for path in found)
    assert [path for path in found if b"hunter2" in path.read_bytes()] == []


def test_rows_have_the_step_of_the_run(files):
    def rows(file):
        return [
            (r["step"], r["attempt"], r["train/loss"]) for r in file.history if "train/loss" in r
        ]

    assert rows(files[0]) == [(step, 1, 1.0 / step) for step in (1, 2, 3)]
    assert rows(files[1]) == [(step, 2, 1.0 / step) for step in (4, 5)], "W&B has step 3"
    assert files[1].history[0]["_step"] == 0, "W&B's own step restarts at 0"


def test_rows_have_the_time_at_which_they_were_logged(twice, files):
    """Before W&B was imported."""
    times = [row["_timestamp"] for row in files[1].history]
    assert times == sorted(times)
    assert times[-1] <= float((twice[0] / "logged").read_text())


def test_step_is_the_x_axis_of_every_metric(files):
    for file in files:
        assert file.metrics["*"].step_metric == "step"
        assert file.metrics["step"].options.defined


def test_texts_images_and_histograms_are_logged(twice, files):
    assert [row["step"] for row in files[0].history] == [1, 2, 3], "all of a step is one row"
    report = files[0].history[-1]
    assert report["sample"]["_type"] == "html-file"
    assert report["drawn"]["_type"] == "image-file"
    assert (report["drawn"]["width"], report["drawn"]["height"]) == (6, 4)
    kept = offline_files(twice[0])[0].parent / "files"
    assert "<pre>&lt;x&gt;&amp;</pre>" in (kept / report["sample"]["path"]).read_text()
    assert (kept / report["drawn"]["path"]).read_bytes().startswith(b"\x89PNG")
    histogram = report["weights/w"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 10


def test_the_summary_has_the_final_numbers(files):
    assert files[0].summary["final/loss"] == 0.125
    assert files[0].summary["goodput/percent"] == 62.5


def test_the_upload_command_is_printed_once(twice):
    directory, first, second = twice
    for done in (first, second):
        said = f"W&B is offline. To upload: isorun sync '{directory}'"
        assert [line for line in done.stdout.splitlines() if "W&B" in line] == [said]
        assert done.stderr == ""


def test_no_file_is_written_outside_the_run_directory(twice):
    assert list((twice[0] / "home").rglob("*")) == []


def test_the_entries_of_the_wandb_directory(twice):
    """A directory per attempt, and one for the cache."""
    names = {path.name for path in (twice[0] / "wandb").iterdir()}
    runs = {path.parent.name for path in offline_files(twice[0])}
    assert len(runs) == 2
    assert names == {*runs, "latest-run", "debug.log", "debug-internal.log", "cache"}


@pytest.mark.parametrize("answers", [slow(False), True], ids=["connection refused", "black hole"])
def test_an_unreachable_service_is_reported_and_logging_is_offline(tmp_path, answers):
    """A closed port, and one that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(100)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
        started = time.perf_counter()
        done = track(tmp_path, env=env, init_seconds=1.0)
        assert time.perf_counter() - started < 60  # W&B itself waits for 90
    (line,) = [line for line in done.stdout.splitlines() if "W&B" in line]
    assert line.startswith("W&B cannot be reached (")
    assert "; logging offline. To upload: isorun sync" in line
    assert done.stderr == ""
    (path,) = offline_files(tmp_path)
    file = WandbFile(path)
    assert file.run.run_id == "digits-wandb-id"
    assert [row["step"] for row in file.history if "train/loss" in row] == [1, 2, 3]


def test_online_without_a_login_is_reported_and_logging_is_offline(tmp_path):
    done = track(tmp_path, track={"wandb": "online"})
    assert "W&B cannot be reached (No API key configured" in done.stdout
    assert "Traceback" not in done.stderr
    assert len(offline_files(tmp_path)) == 1


def test_the_environment_can_disable_wandb(tmp_path):
    done = track(tmp_path, env={"WANDB_MODE": "disabled"})
    assert (done.stdout.count("wandb"), done.stderr) == (0, "")
    assert offline_files(tmp_path) == []


def test_closing_leaves_no_process(tmp_path):
    track(tmp_path, signal_to_service=0)
    closed = json.loads((tmp_path / "closed.json").read_text())
    assert closed["service"] is None


@pytest.mark.slow
def test_rows_before_the_death_of_the_service_are_kept(tmp_path):
    """Including rows that were logged less than a second before."""
    done = track(tmp_path, signal_to_service=signal.SIGKILL, wait=5, exit=75, expect=75)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: W&B failed and is disabled: ")
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert rows == [1, 2, 3, 100, 101, 102]
    (path,) = offline_files(tmp_path)
    assert [r["step"] for r in WandbFile(path).history if "train/loss" in r] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True], ids=["while it starts", "later"])
def test_a_hanging_service_does_not_block_the_exit(tmp_path, opened):
    hangs = {"signal_to_service": signal.SIGSTOP, "opened": opened}
    done = track(tmp_path, **hangs, close=1.0, exit=75, expect=75)
    os.kill(int((tmp_path / "service").read_text()), signal.SIGKILL)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: Timed out after 1 s waiting for the tracking sinks")


URL, KEY = "https://api.wandb.ai", "b" * 40


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in [n for n in os.environ if "WANDB" in n]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(
    ("environment", "netrc", "mode", "url", "key", "expected"),
    [
        ({}, "", "online", URL, None, "offline"),
        ({"WANDB_API_KEY": KEY}, "", "online", URL, None, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "f"}, "", "online", URL, None, "online"),
        ({"WANDB_MODE": "online"}, "", "online", URL, None, "online"),
        ({"WANDB_API_KEY": KEY}, "", "offline", URL, None, "offline"),
        ({"WANDB_API_KEY": KEY}, "", "dryrun", URL, None, "offline"),
        ({"WANDB_API_KEY": KEY}, "", "disabled", URL, None, "disabled"),
        ({}, "", "online", URL, KEY, "online"),
        ({}, "api.wandb.ai", "online", URL, None, "online"),
        ({}, "other.host", "online", URL, None, "offline"),
        ({}, "own.host:8080", "online", "http://own.host:8080", None, "online"),
        ({}, "api.wandb.ai", "online", "http://own.host:8080", None, "offline"),
        ({}, "api.wandb.ai", "offline", URL, None, "offline"),
    ],
)
def test_auto_is_online_only_with_credentials(
    no_login, monkeypatch, tmp_path, environment, netrc, mode, url, key, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(f"machine {netrc} login user password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode("auto", mode, url, key) == expected


def test_the_config_takes_precedence(no_login):
    for wanted in ("online", "offline", "disabled"):
        assert wandb_mode(wanted, "offline", URL, None) == wanted


def test_a_broken_netrc_is_not_a_login(no_login, tmp_path):
    (tmp_path / "netrc").write_text("machine machine machine what")
    assert wandb_mode("auto", "online", URL, None) == "offline"


@pytest.mark.parametrize("name", ["wandb", "wandb/cache"])
def test_nothing_of_wandb_is_called_if_its_directory_is_a_link(monkeypatch, tmp_path, name):
    import wandb

    called = []
    monkeypatch.setattr(wandb, "setup", lambda **_: called.append("setup"))
    monkeypatch.setattr(wandb, "init", lambda **_: called.append("init"))
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(tmp_path)
    with pytest.raises(NotRegularError):
        WandbSink(run_info(tmp_path / "run"), TrackConfig()).open()
    assert called == []
