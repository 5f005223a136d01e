"""`isorun cluster stacks`: the stacks of the ranks in all pods of a run."""

import os
import re

import pytest

from launch.cli import main
from train.process.stacks import StackRequests

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory"),
]
RANK = 4711  # other runs on this machine have lower ones


def test_the_stacks_of_all_pods_are_printed(run, cluster, tmp_path, capfd):
    """Each pod is a directory of this machine, so both have the same rank."""
    with StackRequests(RANK, tmp_path):
        assert main(["cluster", "stacks", run, "--rank", str(RANK)]) == 0
    out = capfd.readouterr().out
    assert len(re.findall(rf"^rank {RANK} on ", out, re.M)) == 2
    assert "\n  MainThread\n    File " in out
    pods = [pod["metadata"]["name"] for pod in cluster.pods()]
    for pod in pods:
        assert f"exec {pod} --container train -- python -P -m train stacks --json" in (
            (tmp_path / "calls").read_text()
        )


def test_pods_that_do_not_answer_are_named(run, cluster, tmp_path, capfd, monkeypatch):
    (tmp_path / "fails").write_text("error: unable to upgrade connection: EOF\n")
    assert main(["cluster", "stacks", run]) == 75
    first, second = capfd.readouterr().err.splitlines()
    name = cluster.pods()[1]["metadata"]["name"]
    assert second.startswith(f"isorun: warning: node 1 ({name}): The pod {name} could not be reach")
    assert first.startswith("isorun: warning: node 0 (")
    (tmp_path / "fails").unlink()
    for said, text in (("[]", "no rank is at work"), ("[{}]", "not that of this version")):
        monkeypatch.setattr("launch.pods.stacks._COMMAND", ["echo", said])
        assert main(["cluster", "stacks", run]) == 75
        assert f"node 0 ({cluster.pods()[0]['metadata']['name']}): " in (
            err := capfd.readouterr().err
        )
        assert text in err


def test_a_rank_or_a_pod_that_is_not_there_is_one_sentence(run, cluster, tmp_path, capfd):
    with StackRequests(RANK, tmp_path):
        assert main(["cluster", "stacks", run, "--rank", str(RANK + 1)]) == 64
    assert f"--rank is {RANK + 1}, but the ranks of " in capfd.readouterr().err
    for pod in cluster.pods():
        cluster.end(pod)
    assert main(["cluster", "stacks", run]) == 64
    assert "has no running pod; its pods are text-" in capfd.readouterr().err
