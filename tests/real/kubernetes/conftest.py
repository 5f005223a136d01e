"""A namespace for the tests: in the cluster that KUBECONFIG names, or in one that the tests start on
this machine (tests/real/kubernetes/local.py).
"""

import os
import secrets
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.real.kubernetes.kube import Kube
from tests.real.kubernetes.local import STATE, LocalCluster, unavailable
from tests.real.kubernetes.runs import STEPS, completed, fit

# Tests with the mark `begins` come first: their fixtures start small objects that need some time,
# and that other tests of the same file examine. These files follow, for a CI run that has no time
# for all.
FIRST = ("test_validation.py", "test_runs.py", "test_controllers.py", "test_torchx.py")
started = None  # when the first of these tests was set up


def pytest_collection_modifyitems(items):
    places = [n for n, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    own = [items[place] for place in places]
    own.sort(key=_turn)
    for place, item in zip(places, own, strict=True):
        items[place] = item


def _turn(item):
    if item.get_closest_marker("begins"):
        return -1
    return FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)


def pytest_runtest_setup():
    """Skips tests of this directory that have not started ISORUN_TEST_KUBERNETES_SECONDS after the
    first one."""
    global started
    started = started or time.monotonic()
    limit = os.environ.get("ISORUN_TEST_KUBERNETES_SECONDS")
    if limit and time.monotonic() - started > float(limit):
        pytest.skip(f"the tests on a cluster have had their {limit} s "
                    "(ISORUN_TEST_KUBERNETES_SECONDS)")  # fmt: skip


@pytest.fixture(scope="session")
def cluster(request):
    """The cluster on this machine, with KUBECONFIG, ISORUN_TEST_IMAGE and kubectl in PATH; None if
    KUBECONFIG names another one."""
    if given := os.environ.get("KUBECONFIG"):
        if not os.environ.get("ISORUN_TEST_IMAGE"):
            pytest.skip("ISORUN_TEST_IMAGE is not set; name an image on the cluster's nodes")
        yield LocalCluster.find(given)
        return
    if reason := unavailable():
        pytest.skip(reason)
    made = LocalCluster.start(request.getfixturevalue("image_file"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(made.kubeconfig))
        patch.setenv("ISORUN_TEST_IMAGE", "isorun-test:cpu")
        patch.setenv("PATH", f"{STATE}/bin", prepend=os.pathsep)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="session")
def kube(cluster):
    """The cluster, with an empty namespace of level `restricted` and a volume for runs."""
    image = os.environ["ISORUN_TEST_IMAGE"]
    made = Kube(f"isorun-test-{secrets.token_hex(3)}", image, cluster)
    made.create_namespace("restricted")
    try:
        with shared_directory(made) if cluster else volume(made):
            yield made
    finally:
        made.delete_namespace()


@pytest.fixture
def name():
    return f"text-{secrets.token_hex(3)}"


@pytest.fixture(scope="session")
def undisturbed(kube):
    """The name of a run of two pods that has ended."""
    name = f"text-{secrets.token_hex(3)}"
    kube.apply(kube.objects(name, fit(name, STEPS), preflight="auto"))
    completed(kube, name)
    return name


class shared_directory:  # noqa: N801
    """A volume that all nodes of the cluster on this machine share: a directory."""

    def __init__(self, kube):
        self._kube, self.path = kube, Path(f"/tmp/{kube.namespace}-runs")

    def __enter__(self):
        self.path.mkdir()
        self.path.chmod(0o1777)  # runs have another user
        self._kube.volume = self.path
        self._kube.apply([{
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": self._kube.namespace},
            "spec": {
                "capacity": {"storage": "100Gi"},
                "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": self._kube.namespace, "name": self._kube.claim},
                "hostPath": {"path": str(self.path)},
            },
        }])  # fmt: skip

    def __exit__(self, *_):
        self._kube.run(
            "delete", "pv", self._kube.namespace, "--wait=false", namespace=False, check=False
        )
        shutil.rmtree(self.path, ignore_errors=True)


class volume:  # noqa: N801
    """A volume for clusters that provision none: a directory of one node."""

    def __init__(self, kube):
        self._kube, self._name = kube, f"{kube.namespace}-runs"
        self._made = False

    def __enter__(self):
        classes = self._kube.get("storageclasses", namespace=False)
        default = "storageclass.kubernetes.io/is-default-class"
        if any(c["metadata"].get("annotations", {}).get(default) == "true" for c in classes):
            return
        nodes = self._kube.get("nodes", namespace=False)
        host = next(n for n in nodes if not n["spec"].get("unschedulable") and not _tainted(n))
        self._made, path = True, f"/tmp/{self._name}"
        hostname = host["metadata"]["labels"]["kubernetes.io/hostname"]
        self._prepare(path, hostname)
        term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [hostname]}
        made = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": self._name},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": self._kube.namespace, "name": self._kube.claim},
                "hostPath": {"path": path},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}},
            },
        }
        self._kube.run("create", "-f", "-", given=yaml.safe_dump(made), namespace=False)

    def _prepare(self, path, hostname):
        """Kubernetes creates the directory for root, but runs have another user. A privileged pod
        in a separate namespace changes its permissions."""
        helper = Kube(f"{self._kube.namespace}-setup", self._kube.image)
        helper.create_namespace("privileged")
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "setup"},
            "spec": {
                "restartPolicy": "Never",
                "nodeSelector": {"kubernetes.io/hostname": hostname},
                "containers": [
                    {
                        "name": "setup",
                        "image": helper.image,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python", "-c", "import os; os.chmod('/host', 0o777)"],
                        "securityContext": {"runAsUser": 0},
                        "volumeMounts": [{"name": "host", "mountPath": "/host"}],
                    }
                ],
                "volumes": [
                    {"name": "host", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
                ],
            },
        }
        try:
            helper.run("create", "-f", "-", given=yaml.safe_dump(pod))
            helper.run(
                "wait", "pod/setup", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=300s"
            )
        finally:
            helper.delete_namespace()

    def __exit__(self, *_):
        if self._made:
            self._kube.run("delete", "pv", self._name, "--wait=false", namespace=False)


def _tainted(node):
    return any(t["effect"] in ("NoSchedule", "NoExecute") for t in node["spec"].get("taints", []))
