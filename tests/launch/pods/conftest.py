"""A run in the small Kubernetes of the tests, whose pods are a directory of this machine."""

import sys

import pytest

from launch.kubernetes.scheduler import create_scheduler
from launch.torchx.components import fit
from tests.support.api_server import Server
from tests.support.cluster import Cluster
from tests.support.kubectl import kubectl
from tests.support.run_files import make_run
from tests.support.runs import ROOT

EXEC = """#!/bin/sh
echo "$*" >> {folder}/calls
if [ -e {folder}/fails ]; then cat {folder}/fails >&2; exit 1; fi
while [ "$1" != -- ]; do shift; done
shift
cd {folder}/pod
if [ "$1" = python ]; then shift 2; set -- {python} "$@"; fi
PYTHONPATH={root} "$@"
code=$?
if [ $code != 0 ]; then echo "command terminated with exit code $code" >&2; fi
exit $code
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    made = Cluster()
    with Server(made, tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield made


@pytest.fixture(scope="package")
def submission():
    """The objects of a run of two pods, rendered once."""
    app = fit("run.dir=runs/mine", config=["configs/text.yaml"], j="2x1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISORUN_KUSTOMIZE", kubectl())
        patch.chdir(ROOT)
        cfg = {"overlay": "cpu-demo", "namespace": "ml"}
        return create_scheduler("test").submit_dryrun(app, cfg)


@pytest.fixture
def run(cluster, submission, tmp_path, monkeypatch):
    """The id, NAMESPACE:NAME, of a run of two pods that run, with a run directory. `kubectl exec`
    runs programs in the directory `pod`."""
    made = create_scheduler("test").schedule(submission)
    pod = tmp_path / "pod"
    (pod / "configs").mkdir(parents=True)
    (pod / "configs/text.yaml").symlink_to(ROOT / "configs/text.yaml")
    (pod / "runs").mkdir()
    make_run(pod / "runs/mine", rows={1: 3.0, 2: 2.0, 3: 1.5}, checkpoint={"a": 1})
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(EXEC.format(folder=tmp_path, python=sys.executable, root=ROOT))
    program.chmod(0o755)
    monkeypatch.setenv("ISORUN_KUSTOMIZE", str(program))
    monkeypatch.chdir(tmp_path)
    return made
