"""A stop request under torchrun (which restarts ranks), during start-up, or causing an error."""

import hashlib
import json
import os
import signal
import subprocess
import threading
import time

import pytest

from tests.support.forked import quick, quick_run, quick_start, run
from tests.support.runs import checkpoints, command, metrics
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.run_view import Run
from train.exits import StoppedError, UsageError
from train.process.stop import StopConfig, StopRequest


def attempts(directory):
    return [json.loads(line) for line in (directory / "attempts.jsonl").open()]


def wait_until(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("text", ["nan", "-1", "0", "soon"])
def test_a_deadline_that_is_not_a_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("ISORUN_STOP_DEADLINE", text)
    with pytest.raises(UsageError, match=f"ISORUN_STOP_DEADLINE must be .* but is '{text}'"):
        StopRequest(StopConfig())


@pytest.mark.slow
def test_torchruns_restarts_do_not_resume_a_stopped_run(tmp_path):
    options = ["length.steps=2000", "task.sleep=0.02", "batch.micro_batch_size=6"]
    words = command("fit", tmp_path, *options, processes=2)
    at = words.index("--nproc-per-node")
    words[at:at] = ["--max-restarts", "2"]
    launcher = subprocess.Popen(
        **quick(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and metrics(tmp_path), launcher)
    (tmp_path / "stop").touch()
    out, err = launcher.communicate(timeout=120)
    assert "it is saved" in out
    assert "torchrun's restart does not resume it" in err
    assert len(attempts(tmp_path)) == 1
    saved = checkpoints(tmp_path)[-1]
    assert saved < 2000
    quick_run("fit", tmp_path, *options, f"length.steps={saved + 2}", "schedule.use=constant",
        "--allow-changes", processes=2)  # fmt: skip
    assert attempts(tmp_path)[-1]["resumed_from_step"] == saved


@pytest.mark.parametrize(
    ("launch", "restarts", "refused"),
    [("a", 1, True), ("a", 0, False), ("b", 1, False), (None, 0, False)],
)
def test_only_a_restart_by_torchrun_keeps_a_run_stopped(
    tmp_path, monkeypatch, launch, restarts, refused
):
    """A rendezvous after a change of nodes does not increase torchrun's restart count; another
    torchrun has another run id."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    RunDirectory(tmp_path).mark_stopped()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    if launch:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    if refused:
        with pytest.raises(StoppedError):
            RunDirectory(tmp_path).refuse_restart_after_stop()
    else:
        RunDirectory(tmp_path).refuse_restart_after_stop()
        assert list(tmp_path.iterdir()) == []


def test_the_agent_restarts_ranks_that_its_lost_neighbour_has_stopped(tmp_path, monkeypatch):
    """Linux asks the ranks of an agent that is killed to stop, and they agree on it with all."""
    monkeypatch.setenv("ISORUN_LAUNCHER", "isorun agent")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        RunDirectory(tmp_path).refuse_restart_after_stop()
        RunDirectory(tmp_path).mark_stopped()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stop_file_written_during_start_up(tmp_path):
    process = quick_start("fit", tmp_path, "task.use=tests.faults.tasks:SlowToBuild")
    wait_until((tmp_path / "building").exists, process)
    (tmp_path / "stop").touch()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 143, err
    assert checkpoints(tmp_path)[-1] < 40
    run("fit", tmp_path, "task.use=tests.faults.tasks:SlowToBuild")


def test_an_error_caused_by_a_stop_request_exits_with_75(tmp_path):
    process = run("fit", tmp_path, "task.use=tests.faults.tasks:BreaksWhenStopped", expect=75)
    assert "asked to stop (SIGTERM)" in process.stderr
    assert "the compiler died" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_process_ends_does_not_change_its_exit_code(number):
    """torchrun signals all ranks as soon as one has ended."""
    pid = os.fork()
    if pid == 0:
        with StopRequest(StopConfig()):
            pass
        os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.fixture
def in_session():
    """A stop request of train.fit, in a run that has started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest(StopConfig(), in_session=True) as stop:
        stop.ranks_joined()
        yield stop
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_during_one_call_of_c_code_stops_at_once(in_session):
    """Python calls the handler once, after the C code."""

    def press_twice():
        for _ in range(2):
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press_twice)

    def compute():
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
        thread.join()

    with pytest.raises(KeyboardInterrupt):
        compute()
    thread.join()


def test_a_second_ctrl_c_that_comes_before_the_first_is_read_stops_at_once(in_session):
    """C code that holds Python's lock delays the thread that reads the signals."""

    def arrive():
        in_session._raise_interrupt(signal.SIGINT, None)
        in_session._writer.send(bytes([signal.SIGINT, signal.SIGINT]))
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        arrive()
    time.sleep(0.2)  # it is raised once


def test_ctrl_c_after_another_request_stops_at_once_only_when_repeated(in_session):
    in_session._handle(signal.SIGUSR1)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_attempts_have_the_end_that_they_came_to(tmp_path):
    """Killed, failed, and finished; and stopped on request."""
    base = ["checkpoint.every_steps=5", "checkpoint.asynchronous=false"]
    run("fit", tmp_path / "one", *base, "task.kill_at_step=8", expect=-9)
    nan = ["optim.max_skipped_steps=2", "task.nan_at_steps=[4,5,6,7]"]
    run("fit", tmp_path / "one", *base, *nan, expect=78)
    run("fit", tmp_path / "one", *base)
    killed, failed, finished = (a.get("ended") for a in Run(tmp_path / "one").attempts)
    assert killed is None
    assert failed["code"] == 78
    assert "not finite" in failed["reason"]
    assert (finished["code"], finished["reason"]) == (0, "finished at step 40")
    log = (tmp_path / "one/logs/rank-0.log").read_text()
    assert "the attempt before: no recorded end" in log
    assert "the attempt before: exit code 78" in log
    assert "all well" in run("verify", tmp_path / "one").stdout
    stops = ["task.use=tests.faults.tasks:StopsInEvaluation", "evaluate.every_steps=10"]
    run("fit", tmp_path / "two", *base, *stops, expect=143)
    (stopped,) = Run(tmp_path / "two").attempts
    assert stopped["ended"]["code"] == 143
    assert stopped["ended"]["reason"] == "stopped at step 10"
