"""A namespace for the tests, in the cluster that KUBECONFIG names."""

import os
import secrets

import pytest
import yaml

from tests.real.kubernetes.kube import Kube

RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
    "pod-security.kubernetes.io/warn": "restricted",
}


@pytest.fixture(scope="session")
def kube():
    """The cluster, with an empty namespace of level `restricted` and a volume for runs."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG is not set")
    image = os.environ.get("ISORUN_TEST_IMAGE")
    if not image:
        pytest.skip("ISORUN_TEST_IMAGE is not set; name an image on the cluster's nodes")
    made = Kube(f"isorun-test-{secrets.token_hex(3)}", image)
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": made.namespace, "labels": RESTRICTED},
    }
    made.run("create", "-f", "-", given=yaml.safe_dump(namespace), namespace=False)
    try:
        with volume(made):
            yield made
    finally:
        made.run("delete", "namespace", made.namespace, "--wait=false", namespace=False)


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
                "claimRef": {"namespace": self._kube.namespace, "name": "runs"},
                "hostPath": {"path": path},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}},
            },
        }
        self._kube.run("create", "-f", "-", given=yaml.safe_dump(made), namespace=False)

    def _prepare(self, path, hostname):
        """Kubernetes creates the directory for root, but runs have another user. A privileged pod
        in a separate namespace changes its permissions."""
        helper = Kube(f"{self._kube.namespace}-setup", self._kube.image)
        namespace = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": helper.namespace},
        }
        namespace["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": "privileged"}
        helper.run("create", "-f", "-", given=yaml.safe_dump(namespace), namespace=False)
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
            helper.run("delete", "namespace", helper.namespace, "--wait=false", namespace=False)

    def __exit__(self, *_):
        if self._made:
            self._kube.run("delete", "pv", self._name, "--wait=false", namespace=False)


def _tainted(node):
    return any(t["effect"] in ("NoSchedule", "NoExecute") for t in node["spec"].get("taints", []))
