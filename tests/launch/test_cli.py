"""``isorun``: every command of both packages under one name, from any directory."""

import subprocess
import sys
from pathlib import Path

import pytest

import launch.cli
from launch.cli import main
from tests.commands.test_help import light
from tests.support.runs import ROOT, TINY, environment
from train import __version__
from train.command_line import exit_code_of, say
from train.commands import COMMANDS
from train.exits import DataError
from train.output import log

ISORUN = str(Path(sys.executable).with_name("isorun"))


def isorun(directory, *words, expect=0):
    done = subprocess.run(
        [ISORUN, *words], cwd=directory, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_help_lists_the_commands_of_both_packages_and_imports_nothing_heavy():
    done = light("--help", package="launch")
    assert done.returncode == 0, done.stderr
    training, launching = done.stdout.split("training:")[1].split("launching:")
    for name, text in COMMANDS.items():
        assert f"    {name} " in training
        assert text in training
    for name in ("history", "show", "why", "tune", "render", "doctor", "agent"):
        assert f"    {name} " in launching


def test_the_script_shows_the_version():
    assert isorun(ROOT, "--version").stdout == f"isorun {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["doctr"], "'doctr' is not a command; did you mean doctor? The commands are fit, "),
        (["shcema"], "did you mean schema?"),
        (["histroy"], "did you mean history?"),
        ([], "arguments are required: COMMAND; see `isorun --help`."),
        (["--verbose"], "arguments are required: COMMAND; see `isorun --help`."),
        (["--config", "x", "fit"], "must be the first argument, but is after '--config'; write"),
        (["-v", "history"], "write `isorun history ...`."),
        (["fit", "--alow-changes"], "'--alow-changes'; did you mean --allow-changes?"),
        (["fit", "--resume"], "see `isorun fit --help`."),
        (["show"], "see `isorun show --help`."),
        (["doctor", "--level", "deep"], "see `isorun doctor --help`."),
        (["agent", "--nodes", "2"], "write -- before the command: `isorun agent [options] --"),
        (["agent"], "such as `isorun agent --nproc-per-node 2 -- isorun fit"),
    ],
)
def test_a_usage_error_is_one_line_with_exit_code_64(monkeypatch, capfd, words, expected):
    monkeypatch.setattr("os._exit", sys.exit)  # called by the doctor
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 64
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("isorun: error: ")
    assert expected in line
    assert out == ""


def test_an_unexpected_error_is_a_traceback_with_exit_code_70(monkeypatch, capsys):
    def fails(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr(launch.cli, "_run", fails)
    assert main(["history"]) == 70
    assert "KeyError: 'no such thing'" in capsys.readouterr().err


def test_a_command_that_prints_is_done_when_its_reader_is_gone(monkeypatch, unread):
    """As in ``isorun history | head -1``. The second text is still in the buffer at the end."""
    for text in ("x" * 100_000, "x"):
        monkeypatch.setattr(launch.cli, "_run", lambda *_, text=text: print(text) or 0)
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(["history"]) == 0
        unread.flush()  # or Python exits with 120


def test_another_command_keeps_its_exit_code_when_nobody_reads_its_output(monkeypatch, unread):
    def fails():
        log("it failed")
        say("it failed")
        raise DataError("It failed.")

    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "stderr", unread)
    assert exit_code_of(fails) == 65
    assert exit_code_of(lambda: 3) == 3


def test_an_error_that_is_no_exception_is_a_bug(capsys):
    """As the bindings of libraries in Rust raise it."""

    class PanicException(BaseException):
        pass

    def fails():
        raise PanicException("index out of bounds")

    assert exit_code_of(fails) == 70
    assert "PanicException: index out of bounds" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # --help of argparse
        exit_code_of(sys.exit)


def test_a_broken_pipe_of_another_command_is_an_error(capsys):
    def fails():
        raise BrokenPipeError(32, "Broken pipe")

    assert exit_code_of(fails) == 70
    assert "Traceback" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code_of(lambda: print("lost") or 0, prints=True) == 75
    assert "Standard output cannot be written: No space left" in capsys.readouterr().err


@pytest.fixture
def with_train_py(tmp_path):
    """A directory with a task, and a train.py and a launch.py of the user."""
    for name in ("train.py", "launch.py"):
        (tmp_path / name).write_text("raise SystemExit('the file of the user ran')\n")
    (tmp_path / "own.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\n"
        "from tests.support.tiny import TinyTask as Own\n"
    )
    return tmp_path


@pytest.mark.slow
def test_an_agent_and_its_preflight_never_run_a_train_py_of_the_user(with_train_py):
    directory = with_train_py
    fit = ["fit", *TINY, "task.use=own:Own", "length.steps=6", "run.dir=run"]
    command = ["python", "-m", "train", *fit]
    done = isorun(
        directory, "agent", "--nproc-per-node", "2", "--preflight", "quick", "--", *command
    )
    assert "Preflight (quick): 1 node, 2 processes" in done.stdout
    assert "Placement: 2 x cpu" in done.stdout
    assert "Finished: 6 steps" in done.stdout
    assert " -P -m train verify " in done.stdout, (
        "the output must have a command that can be copied"
    )
    assert "is already finished" in isorun(directory, *fit).stdout
