"""The command and the working directory of the ranks."""

import sys

import pytest

from launch.agent.command import doctor_command, is_doctor, rank_command
from launch.contract import train_arguments
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
