"""Hints name commands as the user has called this one."""

import sys
from pathlib import Path

import pytest

from launch.agent import main as agent
from launch.agent.options import parse
from launch.contract import TYPED
from train.program import typed_command


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A working directory with an environment that PATH does not lead to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(TYPED, raising=False)
    folder = tmp_path / "env/bin"
    folder.mkdir(parents=True)
    for name in ("isorun", "python"):
        (folder / name).touch(0o700)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    return folder


def called(monkeypatch, program, name="verify"):
    monkeypatch.setattr("sys.argv", [str(program), "fit"])
    return typed_command(name)


def test_the_script(monkeypatch, here):
    assert called(monkeypatch, "env/bin/isorun") == ["env/bin/isorun", "verify"]
    assert called(monkeypatch, here / "isorun") == ["env/bin/isorun", "verify"]
    monkeypatch.setenv("PATH", str(here))
    assert called(monkeypatch, here / "isorun") == ["isorun", "verify"]


def test_the_modules(monkeypatch, here):
    assert called(monkeypatch, "/x/train/__main__.py") == [
        "env/bin/python",
        "-m",
        "train",
        "verify",
    ]
    found = called(monkeypatch, "/x/launch/__main__.py", "history")
    assert found == ["env/bin/python", "-m", "launch", "history"]
    monkeypatch.setenv("PATH", str(here))
    assert called(monkeypatch, "/x/train/__main__.py") == ["python", "-m", "train", "verify"]
    Path("train.py").touch()
    assert called(monkeypatch, "/x/train/__main__.py") == ["python", "-P", "-m", "train", "verify"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["isorun", "fit"], ["isorun", "verify"]),
        (["env/bin/isorun", "fit"], ["env/bin/isorun", "verify"]),
        ([sys.executable, "-m", "train", "fit"], ["env/bin/python", "-m", "train", "verify"]),
    ],
)
def test_the_ranks_of_an_agent(monkeypatch, command, expected):
    for name in ("OMP_NUM_THREADS", "ISORUN_STOP_DEADLINE"):
        monkeypatch.setenv(name, "1")  # set by the agent, so restored after the test
    monkeypatch.setenv(TYPED, "of an agent around this one")
    agent._prepare_environment(parse(["--", *command], {}))
    assert called(monkeypatch, "/x/train/__main__.py") == expected
