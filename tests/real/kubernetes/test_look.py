"""`isorun cluster`: looks into a run in a real cluster, while it runs and after its end."""

import json
import re
import subprocess
import sys
import urllib.request
from contextlib import suppress

import pytest

from tests.real.kubernetes.kube import launched
from tests.real.kubernetes.runs import FAULT, completed, fit, overrides
from tests.support.runs import ROOT, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG = 400  # while it runs, there is time for some commands


@pytest.fixture
def isorun(kube, tmp_path):
    """Runs a command of isorun; returns its standard output and error."""

    def run(*words, code=0):
        ended, *said = launched(*words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
        assert ended == code, f"{words}: {ended}\n{''.join(said)}"
        return "".join(said)

    return run


def test_a_run_is_looked_into_while_it_runs_and_after_its_end(kube, isorun, name, tmp_path):
    kube.apply(kube.objects(name, fit(name, LONG)))
    kube.at_step(name, FAULT)
    run = f"{kube.namespace}:{name}"

    said = isorun("cluster", "status", run)
    assert f"{name} in the namespace {kube.namespace}: RUNNING, a Job" in said
    assert re.search(rf"  Step \d+ of {LONG}, logged \d+ s ago", said), said
    assert re.search(rf"  node 0: {name}-0-\w+ on \S+, Running", said), said
    assert re.search(rf"  run: \S+, running, step \d+ of {LONG}, .* sign of life", said), said
    words = ["--", "sh", "-c", "hostname; exit 3"]
    said = isorun("cluster", "stacks", run)  # of the level `restricted`, without ptrace
    ranks = re.findall(r"^rank (\d) on (\S+) ", said, re.M)
    assert [rank for rank, _ in ranks] == ["0", "1"], said
    assert {host for _, host in ranks} == {f"{name}-0", f"{name}-1"}
    assert said.count("\n  MainThread\n    File ") == 2
    where = isorun("cluster", "shell", run, "--node", "1", *words, code=3)
    assert where.startswith(f"{name}-1")
    isorun("cluster", "cp", run, "config.json", "here.json")
    assert json.loads((tmp_path / "here.json").read_text())
    assert "has no none.txt" in isorun("cluster", "cp", run, "none.txt", "x", code=64)

    completed(kube, name)
    said = isorun("cluster", "cp", run, "all")
    assert f"starting the pod {name}-reader-" in said
    words = ["verify", *overrides(name, LONG), f"run.dir={tmp_path / 'all'}"]
    assert "all well" in launched(*words, module="train")[1]
    handle = f"kubernetes_job://torchx/{run}"
    isorun("report", handle, "--to", "run.html")
    assert name in (tmp_path / "run.html").read_text()
    assert f"{LONG}/{LONG}" in isorun("runs", handle)
    assert "SUCCEEDED" in isorun("cluster", "status", run)
    refused = isorun("cluster", "shell", run, code=64)
    assert "has no running pod" in refused
    assert not [p for p in kube.get("pods") if "reader" in p["metadata"]["name"]
                and not p["metadata"].get("deletionTimestamp")]  # fmt: skip


def test_tensorboard_is_served_here(kube, undisturbed, tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "cluster", "tensorboard", "--port", str(port),
         f"{kube.namespace}:{undisturbed}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def runs():
        with suppress(OSError):
            url = f"http://127.0.0.1:{port}/data/runs"
            return json.load(urllib.request.urlopen(url, timeout=10))

    try:
        found = kube.until("TensorBoard", lambda: runs() or process.poll(), "none", 300)
        assert found == ["tensorboard"]
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    readers = [p for p in kube.get("pods") if "reader" in p["metadata"]["name"]]
    assert all(p["metadata"].get("deletionTimestamp") for p in readers)
