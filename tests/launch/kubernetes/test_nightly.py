"""The scheduler on TorchX's nightly, in a separate directory that is cached."""

import json
import os
import subprocess
import sys

import pytest

from tests.launch import nightly
from tests.support.api_server import Server
from tests.support.cluster import Cluster
from tests.support.kubectl import kubectl
from tests.support.runs import ROOT

SCRIPT = """
import json, sys, torchx.schedulers
from torchx.runner import Runner
from torchx.specs import AppState
from launch.torchx.components import fit
from launch.kubernetes.scheduler import create_scheduler

runner = Runner("test", {"kubernetes_job": create_scheduler})
cfg = {"overlay": "cpu-demo", "namespace": "ml", "components": ["debug"]}
app = fit(config=["configs/text.yaml"], j="2x1")
info = runner.dryrun(app, "kubernetes_job", cfg)
said = {"kinds": [o["kind"] for o in info.request.rendered.objects], "file": torchx.__file__}
handle = runner.schedule(info)
said["handle"] = handle
said["state"] = runner.status(handle).state.name
said["listed"] = [a.app_id for a in runner.list("kubernetes_job")]
said["log"] = list(runner.log_lines(handle, "fit", 0))
runner.cancel(handle)
said["cancelled"] = runner.status(handle).state.name
if hasattr(runner, "delete"):
    runner.delete(handle)
    said["deleted"] = runner.status(handle) is None
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["pinned", "nightly"])
def test_a_job_from_dry_run_to_deletion(version, tmp_path):
    paths = [str(ROOT)]
    if version == "nightly":
        paths.insert(0, str(nightly.directory()))
    with Server(Cluster(), tmp_path) as server:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=200,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ISORUN_KUSTOMIZE": kubectl(),
                 "KUBECONFIG": str(server.kubeconfig)},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert ("nightly" in said["file"]) == (version == "nightly")
    assert {"Job", "Service", "NetworkPolicy"} <= set(said["kinds"])
    assert said["handle"].startswith("kubernetes_job://test/ml:text-")
    assert said["state"] == "RUNNING"
    assert said["listed"] == [said["handle"].rpartition("/")[2]]
    assert said["log"] == []
    assert said["cancelled"] == "CANCELLED"
    assert said.get("deleted", True)
    assert ("deleted" in said) == (version == "nightly")
