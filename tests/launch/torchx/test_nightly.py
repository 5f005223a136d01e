"""The tests of tests/launch with TorchX's nightly, and features that only the nightly has."""

import re

import pytest

from launch.torchx import resources
from launch.torchx.schedulers import SCHEDULERS
from tests.launch import nightly
from tests.launch.launching import NIGHTLY
from tests.support.runs import ROOT, TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NIGHTLY, reason="this test run itself uses the nightly"),
]
NAMESPACES_ONLY = {"TORCHX_PLUGINS_SOURCE": "1"}


def test_the_nightly_is_installed(tmp_path):
    assert "torchx-2" in nightly.torchx("--version", cwd=tmp_path).stdout


def test_all_tests_pass_with_the_nightly():
    done = nightly.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                       "tests/launch/torchx", "tests/launch/history",
                       "tests/launch/test_secrets.py", cwd=ROOT)  # fmt: skip
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


@pytest.mark.parametrize("environ", [{}, NAMESPACES_ONLY], ids=["entry points", "namespaces"])
def test_resources_are_found_without_warnings_about_duplicates(tmp_path, environ):
    own = tmp_path / "own.yaml"
    own.write_text("ours: {cpu: 3, memMB: 1000}\n")
    code = "import torchx.specs as s; print([s.resource(h=n).cpu for n in {!r}])"
    names = [*resources.BUILT_IN, "ours"]
    done = nightly.run("-W", "error", "-c", code.format(names), cwd=tmp_path,
                       ISORUN_RESOURCES=str(own), **environ)  # fmt: skip
    expected = [shape.cpu for shape in resources.BUILT_IN.values()] + [3]
    assert done.stdout.strip() == str(expected)
    assert "registered via both" not in done.stderr


def test_user_resources_are_available_to_all_components(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("ours: {cpu: 3, memMB: 1234}\n")
    done = nightly.torchx("run", "--dryrun", "dist.ddp", "-h", "ours", "--script", "x.py",
                          cwd=tmp_path, ISORUN_RESOURCES=str(own))  # fmt: skip
    assert "'memMB': 1234" in done.stdout


def test_an_invalid_resources_file_does_not_hide_built_in_resources(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("ours: [")
    done = nightly.torchx("run", "--dryrun", "dist.ddp", "-h", "gpu_h100_1", "--script", "x.py",
                          cwd=tmp_path, ISORUN_RESOURCES=str(own), **NAMESPACES_ONLY)  # fmt: skip
    assert "'gpu': 1" in done.stdout
    assert "not valid YAML" in done.stderr


def test_schedulers_are_watched_in_both_ways_of_discovery(tmp_path):
    said = nightly.torchx("run", "--help", cwd=tmp_path, **NAMESPACES_ONLY).stdout
    listed = re.search(r"-s \{([^}]+)\}", re.sub(r"\s+", "", said).replace("-s{", "-s {"))[1]
    assert (
        {"local_cwd", "local_docker", "slurm", "kubernetes", "kubernetes_job"}
        <= set(listed.split(","))
        <= set(SCHEDULERS)
    )
    words = ("isorun.fit", "--env", "HF_TOKEN=abc", *TINY)
    done = nightly.torchx("run", "-s", "slurm", "--dryrun", *words, cwd=ROOT, expect=64,
                          **NAMESPACES_ONLY)  # fmt: skip
    assert "--env gives HF_TOKEN in plain text" in done.stderr


def test_the_default_scheduler_is_a_local_one(tmp_path):
    for environ in ({}, NAMESPACES_ONLY):
        done = nightly.torchx("run", "--dryrun", "utils.echo", cwd=tmp_path, **environ)
        assert "role_params" in done.stdout


def test_a_run_trains_with_the_nightly(tmp_path):
    nightly.torchx("run", "-s", "local_cwd", "isorun.fit", "-j", "1x2", *TINY,
                   f"run.dir={tmp_path / 'run'}", cwd=ROOT, OMP_NUM_THREADS="1",
                   XDG_STATE_HOME=str(tmp_path))  # fmt: skip
    assert (tmp_path / "run" / "finished.json").exists()
    ledger = (tmp_path / "isorun" / "launches.jsonl").read_text()
    assert '"state": "SUCCEEDED"' in ledger
