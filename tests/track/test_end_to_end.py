"""Runs with all sinks: killed and resumed, and stopped from a terminal."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import termios
import time

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.forked import run, start, wait_for
from tests.support.runs import ROOT, checkpoints, command, curve, environment, metrics
from tests.track.wandb_file import WandbFile, history, offline_files, records, service

EVERYTHING = [
    "length.steps=400", "checkpoint.every_steps=50", "evaluate.every_steps=50",
    "track.tensorboard=true", "track.wandb=offline",
]  # fmt: skip


def tensorboard(directory):
    """All attempts as TensorBoard shows them."""
    path, guidance = str(directory / "tensorboard"), {"scalars": 0}
    return EventAccumulator(path, size_guidance=guidance).Reload()


def wandb_steps(path, *, growing=False):
    return [row["step"] for row in history(records(path, growing=growing)) if "train/loss" in row]


def wandb_has_written(directory):
    """Whether W&B, which starts late and then writes every second, has the first 50 steps."""
    files = [path for path in offline_files(directory) if path.stat().st_size > 7]
    return any(len(wandb_steps(path, growing=True)) >= 50 for path in files)


def steps_on_disk(directory):
    """The newest step in complete lines of metrics.jsonl."""
    lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def in_an_image():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISORUN_IMAGE", "isorun@sha256:1")
        yield


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory, in_an_image):
    directory = tmp_path_factory.mktemp("run")
    process = start("fit", directory, *EVERYTHING, "task.sleep=0.02")
    wait_for(process, lambda: wandb_has_written(directory) and checkpoints(directory))
    time.sleep(1.2)
    # Well between two checkpoints, so that some steps are taken again.
    wait_for(process, lambda: 10 <= steps_on_disk(directory) % 50 <= 40)
    the_service = service(process.pid)
    process.signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    run("fit", directory, *EVERYTHING)
    attempt = json.loads((directory / "attempts.jsonl").read_text().splitlines()[1])
    return directory, attempt["resumed_from_step"], the_service


def test_metrics_have_each_step_once(killed_and_resumed):
    directory, resumed, _ = killed_and_resumed
    rows = metrics(directory)
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert {row["attempt"] for row in rows[:resumed]} == {1}
    assert {row["attempt"] for row in rows[resumed:]} == {2}
    assert list(curve(directory, "eval/loss")) == list(range(50, 401, 50))


def test_tensorboard_matches_metrics_jsonl(killed_and_resumed):
    """Each step occurs once, and the kill loses no step that a checkpoint covers."""
    directory, _, _ = killed_and_resumed
    events = tensorboard(directory)
    for name in ("train/loss", "train/gradient_norm", "eval/loss"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == list(curve(directory, name))
        assert [v for _, v in shown] == pytest.approx(list(curve(directory, name).values()))


def test_wandb_has_one_run(killed_and_resumed):
    directory, _, _ = killed_and_resumed
    first, second = offline_files(directory)
    born = json.loads((directory / "run.json").read_text())
    attempts = map(json.loads, (directory / "attempts.jsonl").open())
    for path, attempt in zip((first, second), attempts, strict=True):
        file = WandbFile(path)
        assert file.run.run_id == born["wandb_id"]
        assert file.config["run"]["dir"] == str(directory)
        assert file.config["code"] == attempt["code"]
        assert file.config["placement"]["strategy"] == attempt["strategy"]
        assert file.config["dataset"]["samples"] == attempt["samples"]
        assert file.config["image"] == attempt["image"] == "isorun@sha256:1"
        assert file.config["environment"] == attempt["environment"]
        assert file.config["model_summary"] == attempt["model_summary"]
        assert "total (" in attempt["model_summary"]
    told = WandbFile(second).config["attempts"]
    assert list(told) == ["1", "2"], "W&B keeps the last value of a key, so it has all attempts"
    assert "ended" not in told["1"], "it was killed"
    for number in "12":
        assert told[number]["environment"]["torch"]
        assert told[number]["placement"]["world_size"] == 1
    before = wandb_steps(first)
    assert before == list(range(1, len(before) + 1))
    assert len(before) >= 50, "rows older than a second are lost"
    assert wandb_steps(second) == list(range(before[-1] + 1, 401))
    assert WandbFile(second).summary["final/loss"] == curve(directory, "eval/loss")[400]


@pytest.mark.slow
def test_a_file_that_grows_is_read_up_to_its_last_whole_record(killed_and_resumed, tmp_path):
    whole = offline_files(killed_and_resumed[0])[1]
    data, cut = whole.read_bytes(), tmp_path / "cut.wandb"
    lengths = set()
    for size in range(len(data) - 300, len(data)):
        cut.write_bytes(data[:size])
        found = records(cut, growing=True)
        assert found == records(whole)[: len(found)]
        lengths.add(len(found))
    assert len(lengths) > 1


def test_a_killed_run_leaves_no_process(killed_and_resumed):
    deadline = time.monotonic() + 15
    while os.path.exists(f"/proc/{killed_and_resumed[2]}/exe"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_stops_the_run(tmp_path):
    """The terminal sends it to every process of the run; the run saves and closes its sinks."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        os.chdir(ROOT)
        words = command("fit", tmp_path, *EVERYTHING, "task.sleep=0.02")
        os.execve(words[0], words, {**environment(), "TERM": "xterm"})
    shown, typed = b"", False
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # a pty raises this when the other end is closed
            break
        if not part:
            break
        shown += part
        if not typed and wandb_has_written(tmp_path):
            os.write(terminal, b"\x03")
            typed = True
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143, text
    assert typed
    assert "finishing the step and saving" in text
    assert "Stopped on request after step" in text
    assert "warning" not in text
    assert "Traceback" not in text
    last = checkpoints(tmp_path)[-1]
    assert list(curve(tmp_path)) == list(range(1, last + 1))
    (path,) = offline_files(tmp_path)
    assert wandb_steps(path) == list(range(1, last + 1))
    assert WandbFile(path).exit_code == [0]
    events = tensorboard(tmp_path).Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, last + 1))
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor must be shown again"
