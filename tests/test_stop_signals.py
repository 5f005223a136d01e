"""Stop signals before, and while, a process handles them."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.support.runs import ROOT
from train.checkpoint.store import CheckpointStore
from train.command_line import exit_code_of
from train.loop.checkpointing import Checkpointing
from train.process import stop, watchdog
from train.process.stop import StopConfig, StopRequest
from train.process.stop_signals import (
    STOP_SIGNALS,
    end_at_stop_signals,
    handled_signals,
    interrupt,
    stop_signals_blocked,
)
from train.process.watchdog import Watchdog, WatchdogConfig

ALL_BUT_SIGINT = [number for number in STOP_SIGNALS if number != signal.SIGINT]


def in_a_child(function, capfd, beside=lambda pid: None):
    """The exit code and the standard error of a forked process that calls the function; ``beside``
    is called with its number."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(7)
    beside(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, capfd.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("number", ALL_BUT_SIGINT)
def test_a_stop_signal_before_a_run_is_open_ends_with_143(number, capfd):
    def receive():
        signal.signal(number, signal.SIG_DFL)
        end_at_stop_signals()
        os.kill(os.getpid(), number)

    code, err = in_a_child(receive, capfd)
    assert code == 143
    assert f"stopped on request ({number.name}) before a run was open" in err


@pytest.mark.process
def test_a_stop_signal_that_the_parent_has_blocked_is_delivered(capfd):
    def receive():
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        os.kill(os.getpid(), signal.SIGUSR2)
        end_at_stop_signals()

    assert in_a_child(receive, capfd)[0] == 143


@pytest.mark.process
def test_a_process_that_is_forked_before_a_run_is_open_dies_of_the_signal(capfd):
    """As those of a pool that the user's code terminates."""

    def fork():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_at_stop_signals()
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert in_a_child(fork, capfd) == (signal.SIGTERM, "")


@pytest.mark.process
def test_ctrl_c_during_the_first_imports_shows_no_traceback():
    program = (
        "import sys, train.__main__\n"
        "class Interrupted:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'train.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted)\n"
        "sys.exit(train.__main__.run(['fit']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "isorun: stopped.\n")


def test_an_ignored_signal_stays_ignored_except_sigterm_and_sigint():
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    assert set(handled_signals()) == {signal.SIGTERM, signal.SIGINT}
    with StopRequest(StopConfig(), in_session=True) as request:
        request.ranks_joined()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not request.requested
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in handled_signals()


@pytest.mark.parametrize("number", ALL_BUT_SIGINT)
def test_each_signal_requests_a_stop_and_some_start_the_deadline(number):
    signal.signal(number, signal.SIG_DFL)
    with StopRequest(StopConfig(deadline=60.0), in_session=True) as request:
        request.ranks_joined()
        os.kill(os.getpid(), number)
        while not request.requested:
            time.sleep(0.001)
        request._handle(number)  # again, as the kernel repeats SIGXCPU
        assert request.signal == number.name
        kills = number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        assert (request.seconds_left < 60) is kills


def test_a_process_started_while_stop_signals_are_blocked_gets_none():
    sleeps = "import time; print(flush=True); time.sleep(60)"
    with stop_signals_blocked():
        process = subprocess.Popen([sys.executable, "-c", sleeps], stdout=subprocess.PIPE)
    process.stdout.readline()
    for number in STOP_SIGNALS:
        process.send_signal(number)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.process
@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([signal.SIGTERM], 143), ([signal.SIGUSR2], 143), ([signal.SIGINT, signal.SIGINT], 130)],
)
def test_a_stop_signal_ends_a_process_that_is_inside_other_code(numbers, expected, capfd):
    """Such as an evaluation that waits in a collective for a rank that hangs: until that returns,
    Python calls no handler."""
    ready, started = os.pipe()

    def compute():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in ALL_BUT_SIGINT:
            signal.signal(number, signal.SIG_DFL)
        end_at_stop_signals()
        # Without Python's lock; seconds of it are enough, since the exit code is another one then.
        os.write(started, b"x")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)

    def send(pid):
        os.read(ready, 1)
        for number in numbers:
            time.sleep(0.2)
            os.kill(pid, number)

    code, err = in_a_child(compute, capfd, send)
    assert code == expected
    assert "stopped" in err
    assert "Traceback" not in err


@pytest.mark.process
@pytest.mark.parametrize("between", [signal.SIGTERM, signal.SIGXCPU])
def test_a_second_ctrl_c_stops_at_once_also_after_another_signal(between, capfd):
    """The system repeats SIGXCPU each second."""

    def receive():
        request = StopRequest(StopConfig())
        request.ranks_joined()
        for number in (signal.SIGINT, between, signal.SIGINT):
            request._handle(number)

    code, err = in_a_child(receive, capfd)
    assert code == 130
    assert "stopped without saving" in err


def never(*_args, **_kwargs):
    """A system call on a disk that does not answer."""
    threading.Event().wait()


@pytest.mark.process
def test_a_disk_that_does_not_answer_does_not_keep_a_process_that_is_to_end(capfd):
    def receive():
        request = StopRequest(StopConfig(deadline=0.1))
        request.ranks_joined()
        request.report_at_deadline(never)
        request.abrupt_end.record_by(never)
        request._handle(signal.SIGTERM)
        never()

    code, err = in_a_child(receive, capfd)
    assert code == 75
    assert "did not stop within stop.deadline" in err


@pytest.mark.slow
@pytest.mark.process
def test_the_watchdog_ends_a_run_whose_disk_does_not_answer(tmp_path, capfd, monkeypatch):
    def hang():
        with Watchdog(WatchdogConfig(first_timeout=1.0, timeout=1.0), tmp_path, 0, 1, 1):
            monkeypatch.setattr(watchdog, "create", never)
            never()

    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.2)
    code, err = in_a_child(hang, capfd)
    assert code == 75
    assert "The run hung" in err


def test_a_keyboard_interrupt_of_the_code_is_not_a_signal(capsys):
    def mistake():
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)  # as end_at_stop_signals does
    assert exit_code_of(mistake) == 70
    assert "in mistake" in capsys.readouterr().err
    assert exit_code_of(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "isorun: stopped.\n"


@pytest.mark.process
@pytest.mark.parametrize("answers", [True, False])
def test_the_deadline_does_not_wait_for_a_disk_that_does_not_answer(answers, monkeypatch, capfd):
    monkeypatch.setattr(stop, "_READ_TIMEOUT", 0.2 if not answers else 60.0)

    def read():
        if not answers:
            time.sleep(600)
        return "The last committed checkpoint is that of step 20."

    def pass_deadline():
        request = StopRequest(StopConfig())
        request.report_at_deadline(read)
        request._too_late(30.0)

    code, err = in_a_child(pass_deadline, capfd)
    assert code == 75
    assert ("that of step 20" in err) is answers
    assert "last committed checkpoint" in err


def test_the_last_checkpoint_is_read_from_the_disk(tmp_path):
    """Another rank may have committed it, which this rank learns at the next save only."""
    checkpointing = Checkpointing.__new__(Checkpointing)
    checkpointing._store = CheckpointStore(tmp_path)
    assert checkpointing.last_step_on_disk is None
    for step in (10, 20):
        checkpointing._store.path(step).mkdir()
    assert checkpointing.last_step_on_disk == 20
