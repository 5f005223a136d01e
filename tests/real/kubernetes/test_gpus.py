"""GPU overlays, placed by the real scheduler on nodes with pretended GPUs."""

from contextlib import ExitStack

import pytest

from tests.real.kubernetes.local import STATE
from tests.real.kubernetes.runs import completed, told, until_told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
COUNT = 4
SAYS = ["sh", "-c", "echo GPUs: $FAKE_GPUS"]


@pytest.fixture(scope="module", autouse=True)
def gpus(kube, cluster):
    """Four GPUs on each node."""
    if cluster is None:
        pytest.skip("only nodes of a cluster on this machine can be given pretended GPUs")
    from tests.real.kubernetes.device_plugin import RESOURCE, FakeGpus

    nodes = [each["metadata"]["name"] for each in kube.get("nodes", namespace=False)]

    def all_known():
        found = kube.get("nodes", namespace=False)
        return all(each["status"]["allocatable"].get(RESOURCE) == str(COUNT) for each in found)

    with ExitStack() as stack:
        for node in nodes:
            folder = STATE / node / "kubelet" / "plugins_registry"
            stack.enter_context(FakeGpus(folder, COUNT))
        kube.until("the GPUs of all nodes", all_known, "none", 120)
        yield


def objects(kube, name, overlay, *components, command=SAYS, **values):
    """An overlay as rendered, small, and without its volume."""
    given = {"name": name, "image": kube.image, "cpu": "700m", "memory": "1536Mi", "scratch": "64Mi",
             "sharedMemory": "64Mi", "processes": 1, **values}  # fmt: skip
    words = [*components, "--without", "pvc"]
    pairs = [f"{key}={value}" for key, value in given.items()]
    return kube.rendered(overlay, *words, command=command, values=pairs)


def test_each_node_of_a_run_gets_gpus_of_its_own(kube, name):
    kube.apply(objects(kube, name, "multi-node", gpus=3))
    completed(kube, name)
    pods = kube.pods(name)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    for pod in pods:
        said = kube.log(pod)
        assert len(set(said.split("GPUs: ")[1].split()[0].split(","))) == 3, said


def test_runs_share_the_gpus_of_a_node_and_none_gets_more_than_there_are(kube, name):
    kube.apply(objects(kube, name, "single-gpu", gpus=5))
    until_told(kube, name, "Insufficient nvidia.com/gpu")
    assert told(kube, name)[0] == "PENDING"
    kube.run("delete", "job", name)
    sleeps = ["sh", "-c", "echo GPUs: $FAKE_GPUS; sleep 3"]
    names = [f"{name}-{number}" for number in range(3)]
    runs = [objects(kube, each, "single-gpu", gpus=3, command=sleeps) for each in names]
    kube.apply([each for run in runs for each in run])
    until_told(kube, names[2], "Insufficient nvidia.com/gpu")
    for each in names:
        completed(kube, each)


def test_a_quota_of_gpus(kube, name):
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name},
        "spec": {"hard": {"requests.nvidia.com/gpu": "4"}},
    }  # fmt: skip
    kube.apply([quota])
    try:
        kube.apply(objects(kube, name, "multi-node", gpus=3))
        until_told(kube, name, "exceeded quota")
        assert "requested: requests.nvidia.com/gpu=3" in told(kube, name)[1]
    finally:
        kube.run("delete", "quota", name)
    completed(kube, name)  # the Job controller tries again
