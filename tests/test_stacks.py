"""`isorun stacks`: what each rank does now, asked while it goes on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.runs import ROOT, checkpoints, environment, start
from train.cli import main
from train.process.stacks import StackRequests, describe_stacks, stacks_here
from train.process.watchdog import Heartbeat

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory")
RANK = 4711  # other runs on this machine have lower ones
CHILD = """
import os, sys, time
from pathlib import Path
from train.process.stacks import StackRequests
with StackRequests(4711, Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker of a loader
        time.sleep(100)
    print("ready", flush=True)
    sys.stdin.read()
"""


def at_work(event):
    event.wait()


@contextmanager
def thread_at_work():
    event = threading.Event()
    thread = threading.Thread(target=at_work, args=[event], name="my loader")
    thread.start()
    try:
        yield
    finally:
        event.set()
        thread.join()


def of_rank(run=None, seconds=10.0):
    return [each for each in stacks_here(run, seconds) if each["rank"] == RANK]


def test_a_rank_tells_its_phase_and_its_threads(tmp_path):
    with StackRequests(RANK, tmp_path) as requests, thread_at_work():
        (first,) = of_rank(tmp_path)
        assert first["phase"] == "rendezvous"
        requests.heartbeat = Heartbeat("computing", 4, 3, time.monotonic())
        (found,) = of_rank()
    assert (found["phase"], found["step"], found["pid"]) == ("computing", 4, os.getpid())
    assert (found["run"], found["error"]) == (str(tmp_path), "")
    threads = {each["name"]: each["frames"] for each in found["threads"]}
    assert next(iter(threads)) == "MainThread"
    assert threads["my loader"][-1].endswith(" in at_work"), "the first call is the last one"
    assert "stacks" not in threads, "that of the answer says nothing"
    text = describe_stacks(found)
    assert f"rank {RANK} on " in text
    assert "computing of step 5, for " in text
    assert "\n  my loader\n    File " in text
    assert of_rank() == [], "it has ended"
    assert "stacks" not in {thread.name for thread in threading.enumerate()}


def test_another_run_is_not_told(tmp_path):
    with StackRequests(RANK, tmp_path / "one"):
        assert of_rank(tmp_path / "two") == []
        (tmp_path / "link").symlink_to(tmp_path)
        assert len(of_rank(tmp_path / "link/one")) == 1


def test_several_may_ask_at_once(tmp_path):
    found = []
    with StackRequests(RANK, tmp_path):
        askers = [threading.Thread(target=lambda: found.extend(of_rank())) for _ in range(4)]
        for each in askers:
            each.start()
        for each in askers:
            each.join()
    assert [each["error"] for each in found] == [""] * 4
    assert all(each["threads"] for each in found)


def test_a_process_that_asks_waits_for_another_one(tmp_path):
    with StackRequests(RANK, tmp_path):
        links = Path("/proc/self/fd").iterdir()
        (link,) = (each for each in links if str(RANK) in os.path.realpath(each))
        with link.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            (found,) = of_rank(seconds=0.2)
            assert found["error"] == "another process has been asking it for its stacks for 0.2 s"
            timer = threading.Timer(0.2, fcntl.flock, (other, fcntl.LOCK_UN))
            timer.start()
            (found,) = of_rank()
            timer.join()
    assert found["error"] == ""


@pytest.mark.parametrize("answer", [b"", b"[]\n", b'{"threads": 3}\n', b"\xff\n"])
def test_an_answer_that_no_rank_would_give_is_told(answer):
    def write():
        os.read(reader, 1)
        os.write(file, answer + b"\nend of the stacks\n")

    reader, writer = os.pipe()
    file = os.memfd_create(f"isorun-stacks-{os.getpid()}-{writer}-{RANK}")
    thread = threading.Thread(target=write)
    thread.start()
    try:
        (found,) = of_rank()
    finally:
        thread.join()
        for each in (reader, writer, file):
            os.close(each)
    assert found["error"].startswith("the answer cannot be read: ")
    assert describe_stacks(found).endswith(".")


def test_the_command_prints_text_or_json_of_a_rank(tmp_path, capsys):
    with StackRequests(RANK, tmp_path):
        assert main(["stacks", "--rank", str(RANK)]) == 0
        assert f"rank {RANK} on " in capsys.readouterr().out
        assert main(["stacks", str(tmp_path), "--json", "--rank", str(RANK)]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["threads"][0]["name"] == "MainThread"
        assert main(["stacks", "--rank", str(RANK + 1)]) == 64
        assert (
            f"--rank is {RANK + 1}, but the ranks on this machine are " in capsys.readouterr().err
        )


def test_no_rank_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.commands.stacks.stacks_here", lambda run: [])
    assert main(["stacks", str(tmp_path)]) == 64
    assert f"No rank of the run {tmp_path} is at work on this machine" in capsys.readouterr().err
    assert main(["stacks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.process
def test_a_process_that_does_not_run_is_told(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            assert child.stdout.readline() == b"ready\n"
            os.kill(child.pid, signal.SIGSTOP)
            (found,) = of_rank(seconds=0.5)
            assert "no answer within 0.5 s" in found["error"]
            assert "its state is T (stopped)" in found["error"]
            os.kill(child.pid, signal.SIGCONT)
            (found,) = of_rank()
            assert found["pid"] == child.pid, "not that of its worker"
            assert found["threads"][0]["frames"][0].endswith(" in <module>")
            child.stdin.close()
            assert child.wait(timeout=60) == 0
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert of_rank() == []


@pytest.mark.slow
def test_a_training_goes_on_while_its_ranks_are_asked(tmp_path):
    run = tmp_path / "run"
    process = start("fit", run, "length.steps=100000", "track.log_every_steps=100000", processes=2)
    try:
        deadline = time.monotonic() + 200
        found = []
        while [each["step"] > 3 for each in found] != [True, True]:
            assert time.monotonic() < deadline, found
            assert process.poll() is None, process.communicate()
            time.sleep(1)
            found = stacks_here(run)
        assert [each["rank"] for each in found] == [0, 1]
        for each in found:
            assert any(frame.endswith(" in fit") for frame in each["threads"][0]["frames"])
        steps = [each["step"] for each in found]
        for _ in range(20):
            stacks_here(run)
        while any(each["step"] < steps[0] + 10 for each in stacks_here(run)):
            assert time.monotonic() < deadline
            time.sleep(1)
        (run / "stop").touch()
        process.wait(timeout=200)
    finally:
        process.terminate()  # the ranks as well
        process.communicate(timeout=200)
    assert checkpoints(run), "it has saved at the stop"
    assert Path(run / "hangs").exists() is False
