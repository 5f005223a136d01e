"""The templates are found in an installed package as in the sources."""

import subprocess
import sys
import zipfile

import pytest

from tests.launch.kubernetes.objects import K8S, OVERLAYS, environment_with_kubectl
from tests.support.runs import ROOT


@pytest.mark.slow
def test_a_wheel_brings_the_templates_and_renders_from_them(tmp_path):
    sources = tmp_path / "sources"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(sources)], check=True)
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(wheels), str(sources)], check=True,
    )  # fmt: skip
    installed = tmp_path / "installed"
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    there = {
        str(p.relative_to(installed / "launch/kubernetes/k8s"))
        for p in installed.rglob("k8s/**/*.yaml")
    }
    assert there == {str(p.relative_to(K8S)) for p in K8S.rglob("*.yaml")}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "render", OVERLAYS[0]],
        cwd=installed, env=environment_with_kubectl(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kind: Job" in done.stdout
