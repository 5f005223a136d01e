"""The sdist can run its own tests; the wheel has all files that the packages read, and no tests."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.launch.kubernetes.objects import K8S, OVERLAYS, environment_with_kubectl
from tests.support.runs import ROOT


def python(*words, cwd, env=None):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked sdist."""
    home = tmp_path_factory.mktemp("sdist")
    # Built from a clone, so that files that git ignores are not included by accident.
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home / "clone")], check=True)
    python("setup.py", "-q", "sdist", "--dist-dir", home, cwd=home / "clone")
    (packed,) = home.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(home, filter="data")
    return home / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    """The unpacked wheel, built from the sdist."""
    home = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    python(*words, "--wheel-dir", home, sources, cwd=home)
    (wheel,) = home.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home / "installed")
    return home / "installed"


@pytest.mark.slow
def test_the_sdist_has_the_files_of_the_repository(sources):
    there = {str(p.relative_to(sources)) for p in sources.rglob("*") if p.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(tracked.splitlines()) - there <= {".gitignore"}


@pytest.mark.slow
def test_the_sdist_runs_its_tests(sources):
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/config",
        "tests/tasks/test_find.py",
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    assert " passed" in python(*words, cwd=sources, env=env)


@pytest.mark.slow
def test_the_wheel_has_the_packages_and_no_tests(installed):
    names = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert names == {"train", "launch", "torchx_plugins"}
    assert (installed / "train/py.typed").exists()
    assert (installed / "launch/py.typed").exists()
    templates = [folder / "train/templates" for folder in (ROOT, installed)]
    ours, theirs = ({p.relative_to(t) for p in t.rglob("*.txt")} for t in templates)
    assert theirs == ours
    for folder in ("train/report/assets", "train/report/vendor"):
        ours, theirs = (
            {p.relative_to(home / folder) for p in (home / folder).rglob("*") if p.is_file()}
            for home in (ROOT, installed)
        )
        assert theirs == ours, folder
    assert list(installed.glob("*.dist-info/licenses/train/report/vendor/uplot/LICENSE"))


@pytest.mark.slow
def test_the_wheel_renders_from_its_own_kubernetes_templates(installed):
    there = {
        str(p.relative_to(installed / "launch/kubernetes/k8s"))
        for p in installed.rglob("k8s/**/*.yaml")
    }
    assert there == {str(p.relative_to(K8S)) for p in K8S.rglob("*.yaml")}
    env = environment_with_kubectl()
    said = python("-m", "launch", "render", OVERLAYS[0], cwd=installed, env=env)
    assert "kind: Job" in said
