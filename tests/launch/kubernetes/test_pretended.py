"""The scenarios of tests/real/kubernetes/test_controllers.py on the small Kubernetes of the tests,
with processes of this machine instead of pods in a cluster."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.api_server import Server
from tests.support.cluster import Cluster
from tests.support.kubectl import kubectl
from tests.support.kubelet import Kubelet
from tests.support.runs import ROOT

CLASS = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {
        "name": "standard",
        "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_controllers_do_what_those_of_a_real_cluster_do(tmp_path):
    cluster = Cluster()
    kubelet = Kubelet(cluster)
    cluster.objects["storageclasses", None, "standard"] = CLASS
    environment = {
        **os.environ, "ISORUN_TEST_IMAGE": "isorun:pretended", "ISORUN_KUSTOMIZE": kubectl(),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    try:
        with Server(cluster, tmp_path) as server:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 "tests/real/kubernetes/test_controllers.py"],
                cwd=ROOT, env={**environment, "KUBECONFIG": str(server.kubeconfig)},
                capture_output=True, text=True, timeout=1100,
            )  # fmt: skip
    finally:
        kubelet.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in ", done.stdout, re.MULTILINE), done.stdout  # none skipped
