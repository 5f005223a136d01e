"""The tests of tests/real/kubernetes, with processes of this machine instead of pods in a
cluster."""

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
# The other tests cover the same with more waiting; they run only on a real cluster.
TESTS = [
    "test_controllers.py",
    "test_runs.py::test_a_config_error_fails_the_job_at_once",
    "test_runs.py::test_the_namespace_is_restricted_and_has_the_network_policy",
    "test_runs.py::test_delete_leaves_a_checkpoint_from_which_the_same_run_resumes",
    "test_torchx.py::test_a_run_from_submission_to_its_end",
    "test_torchx.py::test_a_config_error_found_only_in_the_image_fails_the_job_at_once",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tests_for_real_clusters_pass_on_the_small_kubernetes(tmp_path):
    cluster = Cluster()
    kubelet = Kubelet(cluster, tmp_path)
    cluster.objects["storageclasses", None, "standard"] = CLASS
    environment = {
        **os.environ, "ISORUN_TEST_IMAGE": "isorun:pretended", "ISORUN_KUSTOMIZE": kubectl(),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        with Server(cluster, tmp_path) as server:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 *(f"tests/real/kubernetes/{test}" for test in TESTS)],
                cwd=ROOT, env={**environment, "KUBECONFIG": str(server.kubeconfig)},
                capture_output=True, text=True, timeout=1100,
            )  # fmt: skip
    finally:
        kubelet.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed in ", done.stdout, re.MULTILINE), done.stdout  # none skipped
