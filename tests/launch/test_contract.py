import subprocess
import sys

import pytest

from launch import contract
from tests.support.runs import ROOT, TINY

HEAVY = ("pydantic", "omegaconf", "numpy", "torch", "rich")


def test_importing_it_imports_nothing_heavy():
    """Every launcher and every agent imports it."""
    code = f"import sys, launch.contract; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", contract.__all__)
def test_every_name_can_be_imported(name):
    assert getattr(contract, name) is not None


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'load_confg'"):
        _ = contract.load_confg


def test_the_run_directory_is_known_without_the_task(tmp_path, monkeypatch):
    """The agent needs it when the task has failed, perhaps outside of a rank."""
    (tmp_path / "failing_task.py").write_text("raise RuntimeError('not in a rank')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["python", "-m", "train", "fit", *TINY, "task.use=failing_task:Task", "run.dir=x"]
    assert str(contract.run_directory(words)) == "x"


def test_a_command_that_prints_its_help_has_no_config(capsys):
    for option in ("--help", "-h"):
        assert contract.training_config(["python", "-m", "train", "fit", option]) is None
    assert capsys.readouterr().out == ""


def test_the_config_of_a_training_command_is_found():
    words = ["python", "-m", "train", "fit", *TINY, "run.dir=/runs/x"]
    assert str(contract.run_directory(words)) == "/runs/x"
    assert contract.run_directory(["python", "prepare.py"]) is None
    assert contract.run_directory([*words, "optim.lrr=1"]) is None, (
        "the launcher must leave the error to train"
    )
