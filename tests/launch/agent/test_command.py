"""The command and the working directory of the ranks."""

import sys

import pytest

from launch.agent.command import check_startable, doctor_command, is_doctor, rank_command
from launch.contract import UsageError, train_arguments
from tests.support.runs import ROOT


@pytest.mark.parametrize(
    ("command", "started"),
    [
        (["python", "-m", "train", "fit"], ["python", "-P", "-m", "train", "fit"]),
        (["python", "-u", "-m", "train", "fit"], ["python", "-P", "-u", "-m", "train", "fit"]),
        (["python", "-um", "train"], ["python", "-P", "-um", "train"]),
        (["python3", "-mtrain"], ["python3", "-P", "-mtrain"]),
        (["python", "-X", "dev", "-m", "train"], ["python", "-P", "-X", "dev", "-m", "train"]),
        (["python", "-Xdev", "-m", "train"], ["python", "-P", "-Xdev", "-m", "train"]),
        (["python", "-W", "error", "-m", "train"], ["python", "-P", "-W", "error", "-m", "train"]),
        (["isorun", "fit", "x=1"], [sys.executable, "-P", "-m", "train", "fit", "x=1"]),
        (["/bin/isorun", "doctor"], [sys.executable, "-P", "-m", "launch", "doctor"]),
        (["python", "-m", "trainer"], ["python", "-m", "trainer"]),
        (["python", "x.py", "-m", "train"], ["python", "x.py", "-m", "train"]),
        (["python", "-X", "-m", "train"], ["python", "-X", "-m", "train"]),
        (["python", "-c", "pass", "-m", "train"], ["python", "-c", "pass", "-m", "train"]),
        (["python", "-m"], ["python", "-m"]),
        (["sh", "-c", "true"], ["sh", "-c", "true"]),
    ],
)
def test_training_is_started_without_the_working_directory_on_the_path(
    monkeypatch, tmp_path, command, started
):
    monkeypatch.chdir(tmp_path)
    assert rank_command(command) == started


def test_the_source_directory_stays_on_the_path_if_isorun_is_not_installed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert rank_command(["python", "-m", "train"]) == ["python", "-m", "train"]


def test_the_doctor_gets_the_training_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    doctor = [sys.executable, "-P", "-m", "launch.doctor", "--level", "full"]
    assert doctor_command("full", []) == doctor
    assert doctor_command("full", ["isorun", "fit"]) == [*doctor, "--", "isorun", "fit"]


@pytest.mark.parametrize(
    ("command", "checks"),
    [
        (["python", "-m", "launch.doctor", "--", "python", "-m", "train", "fit"], True),
        (["isorun", "doctor", "--", "isorun", "fit"], True),
        (["python", "-m", "train", "fit"], False),
        (["isorun", "why", "doctor"], False),
        (["sh", "doctor"], False),
    ],
)
def test_the_doctor_is_recognised(command, checks):
    assert is_doctor(command) == checks


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["isorun", "fit", "x=1"], ("fit", "x=1")),
        (["tini", "--", "python", "-m", "train", "fit"], ("fit",)),
        (["isorun", "why", "x"], None),
        (["python", "train.py"], None),
        ([], None),
    ],
)
def test_training_commands_are_recognised(command, arguments):
    assert train_arguments(command) == arguments


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["no-such-program"], "'no-such-program', which is not found in PATH"),
        ([""], "'', which is not found in PATH"),
        (["./gone.sh"], "'./gone.sh', which does not exist"),
        (["./plain.sh"], "'./plain.sh', which is not executable"),
        (["./folder"], "'./folder', which is a directory"),
        ([sys.executable, "gone.py", "x=1"], "'gone.py', which does not exist in"),
        ([sys.executable, "-u", "gone.py"], "'gone.py', which does not exist in"),
        ([sys.executable, "-m", "no_such_module"], "the module 'no_such_module', which"),
        ([sys.executable, "-um", "no_such.part"], "the module 'no_such.part', which"),
    ],
)
def test_a_command_that_no_rank_could_start_is_refused(monkeypatch, tmp_path, command, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.sh").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as refused:
        check_startable(command)
    assert why in str(refused.value)
    assert str(refused.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    "command",
    [
        ["sh", "-c", "no-such-program"],
        ["./own.sh"],
        ["isorun", "fit"],
        [sys.executable, "here.py"],
        [sys.executable, "-m", "here"],
        [sys.executable, "-m", "json.tool"],
        [sys.executable, "-m", "train", "fit"],
        [sys.executable, "-c", "pass", "gone.py"],
        [sys.executable, "-"],
        [sys.executable],
    ],
)
def test_a_command_that_may_start_is_not(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").touch()
    (tmp_path / "own.sh").touch(0o700)
    check_startable(command)
