"""``new`` writes a project that works without changes."""

import json
import os
import shlex
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.forked import command, run
from tests.support.lanes import thinned
from tests.support.runs import environment
from train.cli import main
from train.commands.new import next_steps


def in_project(directory, *words):
    """Runs a Python command in the project, without further environment variables."""
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=directory, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def shell(tmp_path):
    """Returns a function that runs commands in a new, activated environment with isorun
    installed."""
    there = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(there)], check=True)
    (folder,) = there.glob("lib/python*/site-packages")
    # Packages of this interpreter count as installed in the new environment as well.
    (folder / "tests.pth").write_text(
        f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n"
    )
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env["PATH"] = f"{there / 'bin'}{os.pathsep}{env['PATH']}"
    env["PIP_NO_BUILD_ISOLATION"] = "0"  # disables build isolation: nothing is downloaded
    env["WANDB_MODE"] = "disabled"

    def run(script):
        return subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_the_printed_steps_work_as_printed(shell, tmp_path):
    made = shell("python -m train new 'my project'")
    assert made.returncode == 0, made.stderr
    project = tmp_path / "my project"
    assert sorted(os.listdir(project)) == [
        "README.md", "config.yaml", "my_project", "pyproject.toml", "tests",
    ]  # fmt: skip
    _, steps = made.stdout.split("\nNext:\n")
    lines = [line.strip() for line in steps.splitlines()]
    assert lines == [
        "cd 'my project'",
        "python -m pip install -e '.[dev]'",
        "python -m train fit --config config.yaml",
        "python -m pytest",
    ]
    done = shell("\n".join(lines))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert (project / "runs/my project/finished.json").exists()
    # The README's own command for two processes, with few steps.
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
    thinned(
        ["x", "with-dash", "With.Dots", "null", "true", "deep/inside", "blanks in it", "ünï", "_"],
        kept=["with-dash", "null", "blanks in it"],
    ),
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
def test_invalid_project_names_are_refused(tmp_path, name):
    if name == "a/":
        (tmp_path / "a").write_text("a file")
    before = sorted(tmp_path.iterdir())
    done = command("new", name, expect=64, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("isorun: error: ")
    assert sorted(tmp_path.iterdir()) == before, "files were created"


def test_existing_files_are_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    command("new", "mine", cwd=tmp_path)
    config = tmp_path / "mine/config.yaml"
    config.write_text("changed")
    done = command("new", "mine", expect=64, cwd=tmp_path)
    assert "mine exists already and is not empty; choose another NAME." in done.stderr
    assert config.read_text() == "changed"


@pytest.mark.parametrize(
    ("name", "distribution"), [("ünï", "uni"), ("_", "project"), ("With.Dots x", "with-dots-x")]
)
def test_pip_accepts_the_name_of_the_distribution(tmp_path, monkeypatch, name, distribution):
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 0
    project = tomllib.loads((tmp_path / name / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == distribution
    (package,) = project["tool"]["setuptools"]["packages"]
    assert (tmp_path / name / package / "task.py").exists()


def test_next_steps_use_the_path_of_python_if_it_is_not_in_path(tmp_path, monkeypatch):
    """Without an activated environment ``python`` is missing or another interpreter."""
    monkeypatch.setenv("PATH", "/nowhere")
    cd, install, *_ = next_steps(Path("a b"))
    assert cd == "cd 'a b'"
    assert shlex.split(install) == [sys.executable, "-m", "pip", "install", "-e", ".[dev]"]
