"""``new`` leaves a project that works as it is."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.forked import command, run
from tests.support.runs import environment


def in_project(directory, *words):
    """A Python command as a person would type it there, with nothing else set."""
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=directory, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_its_own_tests_pass_as_generated(tmp_path):
    made = command("new", "my-project", cwd=tmp_path)
    project = tmp_path / "my-project"
    assert "cd my-project" in made.stdout
    assert "python -m train fit --config config.yaml" in made.stdout
    assert sorted(os.listdir(project)) == ["README.md", "config.yaml", "my_project", "tests"]
    done = in_project(project, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    # The README's own command for two processes, on a few steps.
    words = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "train", "fit"]
    rules = ["length.epochs=0.5", "schedule.warmup_steps=0", "track.wandb=disabled", "run.dir=two"]
    done = in_project(project, *words, "--config", "config.yaml", *rules)
    assert done.returncode == 0, done.stderr
    one = run("fit", "one", "--config", "config.yaml", *rules[:-1], base=[], cwd=project)
    assert "Finished" in one.stdout
    both = [json.loads((project / n / "finished.json").read_text()) for n in ("one", "two")]
    assert both[0]["metrics"]["loss"] == pytest.approx(both[1]["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["x", "with-dash", "With.Dots", "null", "true", "deep/inside", "blanks in it", "ünï", "_"],
)
def test_the_config_of_a_project_resolves(tmp_path, name):
    command("new", name, cwd=tmp_path)
    project = tmp_path / name
    done = command("show-config", "--config", "config.yaml", cwd=project)
    assert f"run.name = {project.name!r}" in done.stdout
    package = next(p for p in project.iterdir() if (p / "task.py").exists())
    assert package.name.isidentifier()
    done = command(
        "fit", "--config", "config.yaml", "length.epochs=0.2", "schedule.warmup_steps=0",
        "track.wandb=disabled", "track.tensorboard=false", cwd=project,
    )  # fmt: skip
    assert "Finished" in done.stdout


@pytest.mark.parametrize(
    "name", ["1st", "", "a/", "class", "train", "tests", "!", "torch", "json", "sklearn", "x:y"]
)
def test_names_of_which_no_project_can_be_made(tmp_path, name):
    if name == "a/":
        (tmp_path / "a").write_text("a file")
    before = sorted(tmp_path.iterdir())
    done = command("new", name, expect=64, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("isorun: error: ")
    assert sorted(tmp_path.iterdir()) == before, "nothing is created"


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    command("new", "mine", cwd=tmp_path)
    config = tmp_path / "mine/config.yaml"
    config.write_text("changed")
    done = command("new", "mine", expect=64, cwd=tmp_path)
    assert "mine exists already and is not empty; choose another NAME." in done.stderr
    assert config.read_text() == "changed"
