"""A command that is run to its end, and what is removed, when a stop signal arrives."""

import os
import signal
import sys
import time

import pytest

from tests.support.runs import is_running
from tests.test_stop_signals import in_a_child
from train.command_line import exit_code_of
from train.process.child import run_child
from train.process.cleanup import temporary_directory
from train.process.stop_signals import end_at_stop_signals

# Its process starts another one, as torchrun does. Both write their numbers.
COMMAND = """
import os, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, {handler})
child = os.fork()
Path(sys.argv[1], "child" if child == 0 else "parent").write_text(str(os.getpid()))
if child == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
ENDS = "lambda *_: (Path(sys.argv[1], 'asked').touch(), os.kill(child, 9), sys.exit(0))"


def numbers(folder):
    names = [folder / "child", folder / "parent"]
    while not all(name.exists() and name.read_text() for name in names):
        time.sleep(0.02)
    return [int(name.read_text()) for name in names]


def stopped(tmp_path, capfd, handler, *signals):
    """The exit code and the messages of a command that runs ``COMMAND`` and gets the signals."""

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_at_stop_signals()
        words = [sys.executable, "-c", COMMAND.format(handler=handler), str(tmp_path)]
        os._exit(
            exit_code_of(
                lambda: run_child(words, env=os.environ, stdout=sys.stdout, stderr=sys.stderr)
            )
        )

    def send(pid):
        numbers(tmp_path)
        for number in signals:
            os.kill(pid, number)
            time.sleep(0.3)

    code, err = in_a_child(run, capfd, send)
    assert not any(map(is_running, numbers(tmp_path)))
    return code, err


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 143, "Stopped on request (SIGTERM)"),
        (signal.SIGUSR2, 143, "Stopped on request (SIGUSR2)"),  # it would kill torchrun
        (signal.SIGHUP, 143, "Stopped on request (SIGHUP)"),
        (signal.SIGINT, 130, "isorun: stopped."),
    ],
)
def test_a_stop_signal_stops_the_command_first(tmp_path, capfd, number, code, told):
    ended, err = stopped(tmp_path, capfd, ENDS, number)
    assert ended == code
    assert told in err
    assert "Traceback" not in err
    assert (tmp_path / "asked").exists()


@pytest.mark.process
def test_a_second_ctrl_c_ends_a_command_that_does_not_stop(tmp_path, capfd):
    code, err = stopped(tmp_path, capfd, "signal.SIG_IGN", signal.SIGINT, signal.SIGINT)
    assert (code, "Traceback" in err) == (130, False)


@pytest.mark.process
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT]])
def test_a_temporary_directory_is_removed_at_a_stop_signal(tmp_path, capfd, numbers):
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_at_stop_signals()
        os._exit(exit_code_of(use))

    def use():
        with temporary_directory() as folder:
            (folder / "file").touch()
            (tmp_path / "where").write_text(str(folder))
            time.sleep(60)

    def send(pid):
        while not (tmp_path / "where").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        for number in numbers:
            os.kill(pid, number)

    code, _ = in_a_child(run, capfd, send)
    assert code == (130 if numbers == [signal.SIGINT] else 143)
    assert not os.path.exists((tmp_path / "where").read_text())
