"""Runs as JobSet and TrainJob, by the real controllers. That of Volcano is not there."""

import time

import pytest

from launch.kubernetes.scheduler import create_scheduler
from tests.real.kubernetes.kube import number
from tests.real.kubernetes.runs import FAULT, STEPS, final_loss, fit, of_node, resumed, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CRDS = {"jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org"}


@pytest.fixture
def gang(kube, cluster, request):
    """The component, where its controller is installed."""
    if cluster:
        cluster.add("jobset", "trainer")
    if CRDS[request.param] not in kube.run("get", "crd", "-o", "name", namespace=False):
        pytest.skip(f"the cluster has no {CRDS[request.param]}")
    return request.param


def ended(kube, kind, name):
    """The condition with which the object has ended; None before that."""
    for condition in kube.get(kind, name).get("status", {}).get("conditions") or []:
        ends = condition["type"] in ("Completed", "Complete", "Failed")
        if ends and condition["status"] == "True":
            return condition["type"]
    return None


def apply(kube, objects):
    """Once, or on a busy machine again, as docs/kubernetes.md says: the trainer may not know the
    runtime yet."""
    for _ in range(5):
        try:
            return kube.apply(objects)
        except AssertionError as error:
            if "not found" not in str(error):
                raise
            time.sleep(1)
    raise AssertionError("the TrainJob is refused even though its runtime exists")


@pytest.mark.parametrize("gang", CRDS, indirect=True)
def test_a_gang_restarts_after_a_lost_pod_and_trains_to_the_end(kube, name, gang, undisturbed):
    apply(kube, kube.objects(name, fit(name, STEPS), gang))
    kube.at_step(name, FAULT)
    pod = of_node(kube, name, 1)
    kube.run("delete", "pod", pod, "--wait=false")
    result = kube.until("the end", lambda: ended(kube, gang, name), name)
    assert result in ("Completed", "Complete"), kube.report(name)
    pods = kube.pods(name)
    assert pod not in [p["metadata"]["name"] for p in pods]
    assert sorted(number(p) for p in pods) == [0, 1], "all pods restart together"
    assert (resumed(kube.logs(name)) or 0) >= FAULT, kube.report(name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    if gang == "jobset":
        status = create_scheduler("test").describe(f"{kube.namespace}:{name}")
        assert (status.state.name, status.num_restarts) == ("SUCCEEDED", 1)
        assert "Restarted 1 time(s)" in status.msg
    verify(kube, name, STEPS)
    kube.run("delete", gang, name)
