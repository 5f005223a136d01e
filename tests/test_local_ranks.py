"""The ranks that train.launch starts, and how it reports their end."""

import json
import os
import signal
import sys
import time

import pytest

from tests.support.runs import is_running
from train.distributed.rendezvous import agent_keeps_store
from train.exits import DataError, Exit, OutOfMemoryError, RetryError, RunError
from train.process import local_ranks
from train.process.local_ranks import error_of_rank, rank_environment, run_ranks


class Process:
    """A process that ends with ``code`` when it has been looked at ``polls`` times."""

    def __init__(self, code, polls=0):
        self.returncode, self.polls, self.signals = code, polls, []

    def poll(self):
        self.polls -= 1
        return self.returncode if self.polls < 0 else None

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def rank(tmp_path, code, polls=0, number=0):
    return local_ranks._Rank(number, Process(code, polls), tmp_path / f"{number}.json", [])


def test_ranks_have_no_agent_though_the_calling_process_has_one(tmp_path):
    torchrun = {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "RANK": "0",
        "TORCHELASTIC_ERROR_FILE": "/x", "GROUP_RANK": "0", "ROLE_NAME": "default",
        "MASTER_PORT": "1", "OMP_NUM_THREADS": "5",
    }  # fmt: skip
    own = {"ROLE_ARN": "a", "GROUP_ID": "b"}
    found = rank_environment({**torchrun, **own}, 1, 2, 29500, tmp_path / "1.json")
    assert not agent_keeps_store(found)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_PORT"]) == ("1", "2", "29500")
    assert found["TORCHELASTIC_ERROR_FILE"] == str(tmp_path / "1.json")
    assert found["OMP_NUM_THREADS"] == "5"
    assert not {"TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_NAME"} & found.keys()
    assert own.items() <= found.items()


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_are_asked_to_stop_when_the_calling_process_is_killed(tmp_path, monkeypatch):
    """Such as the kernel of a notebook: they would go on, with its GPUs, and nobody to wait."""
    begin = local_ranks._RANK.partition("runpy.run_module(")[0]
    waits = (
        "import pathlib, time\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(local_ranks, "_RANK", begin + waits)
    calling = os.fork()
    if calling == 0:
        try:
            run_ranks([], 1, grace=None)
        finally:
            os._exit(1)
    file, deadline = tmp_path / "pid", time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(calling, signal.SIGKILL)
    os.waitpid(calling, 0)
    while is_running(int(file.read_text())):
        assert time.monotonic() < deadline, "the rank has survived"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (65, "DataError: The sample 3 is damaged.", DataError("The sample 3 is damaged.")),
        (75, None, RetryError("Rank 0 ended with exit code 75; see its output.")),
        (3, None, RunError("Rank 0 ended with exit code 3; see its output.")),
        (
            71,
            "RuntimeError: no memory",
            OutOfMemoryError("Rank 0 ended with exit code 71 (RuntimeError: no memory)."),
        ),
        (
            70,
            "KeyError: 'x'",
            RunError("Rank 0 ended with exit code 70 (KeyError: 'x')."),
        ),
        (-9, None, RetryError("Rank 0 was ended by SIGKILL; fix the cause, then rerun.")),
        (130, None, KeyboardInterrupt()),
    ],
)
def test_the_error_has_the_class_of_the_exit_code(tmp_path, code, message, expected):
    failed = rank(tmp_path, code)
    if message:
        failed.error_file.write_text(json.dumps({"message": {"message": message}}))
    error = error_of_rank(failed)
    assert (type(error), str(error)) == (type(expected), str(expected))


def test_signals_go_to_the_ranks_once(tmp_path):
    ranks = [rank(tmp_path, Exit.PREEMPTED, 3, number) for number in range(2)]
    assert local_ranks._wait(ranks, [signal.SIGTERM], 60.0) == []
    assert [rank.process.signals for rank in ranks] == [[signal.SIGTERM]] * 2
    with pytest.raises(KeyboardInterrupt):
        local_ranks._wait([rank(tmp_path, 0, 3)], [signal.SIGINT, signal.SIGINT], 60.0)


@pytest.mark.parametrize("received", [[], [signal.SIGTERM]])
def test_a_rank_that_dies_of_a_signal_which_was_passed_on_was_stopped(tmp_path, received):
    dead = rank(tmp_path, -signal.SIGTERM)
    assert local_ranks._wait([dead], received, 60.0) == ([] if received else [dead])


@pytest.mark.parametrize(("grace", "killed"), [(None, False), (60.0, False), (0.0, True)])
def test_other_ranks_have_a_grace_period_after_a_failure(tmp_path, grace, killed):
    failed, healthy = rank(tmp_path, 70), rank(tmp_path, 75, 3, number=1)
    assert local_ranks._wait([failed, healthy], [], grace)[0] is failed
    assert (healthy.process.signals == [signal.SIGKILL]) is killed


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])
def test_a_signal_while_python_starts_in_the_ranks_is_a_stop(monkeypatch, capfd, number):
    wait = local_ranks._wait

    def interrupted(*arguments):
        signal.raise_signal(number)
        return wait(*arguments)

    monkeypatch.setattr(local_ranks, "_wait", interrupted)
    assert run_ranks(["fit"], 2, grace=60.0) == Exit.PREEMPTED
    err = capfd.readouterr().err
    assert err.count(f"stopped on request ({number.name})") == (2 if number != signal.SIGINT else 0)
    assert "Traceback" not in err


@pytest.mark.process
def test_the_last_lines_of_a_rank_are_shown_before_the_call_returns(monkeypatch):
    lines = []

    class Slow:
        def write(self, line):
            time.sleep(0.05)
            lines.append(line)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Slow())
    assert run_ranks(["--help"], 1, grace=60.0) == Exit.DONE
    assert "COMMAND --help" in lines[-1]
