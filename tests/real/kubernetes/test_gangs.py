"""A run as JobSet, by the real controller."""

import os
import time

import pytest

from launch.kubernetes.scheduler import create_scheduler
from tests.real.kubernetes.kube import number
from tests.real.kubernetes.runs import (
    FAULT,
    STEPS,
    final_loss,
    fit,
    of_node,
    resumed,
    told,
    until_told,
    verify,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CRD = "jobsets.jobset.x-k8s.io"


@pytest.fixture
def _controller(kube, cluster):
    if cluster:
        cluster.add("jobset")
    if CRD not in kube.run("get", "crd", "-o", "name", namespace=False):
        pytest.skip(f"the cluster has no {CRD}")


def completed(kube, name):
    """Whether the JobSet has ended with success."""
    conditions = kube.jobset(name).get("status", {}).get("conditions") or []
    assert not [c for c in conditions if c["type"] == "Failed" and c["status"] == "True"]
    return [c for c in conditions if c["type"] == "Completed" and c["status"] == "True"]


@pytest.mark.usefixtures("_controller")
def test_a_jobset_restarts_after_a_lost_pod_and_trains_to_the_end(kube, name, undisturbed):
    kube.apply(kube.objects(name, fit(name, STEPS), "jobset"))
    kube.at_step(name, FAULT)
    pod = of_node(kube, name, 1)
    kube.run("delete", "pod", pod, "--wait=false")
    kube.until("the end", lambda: completed(kube, name), name)
    pods = kube.pods(name)
    assert pod not in [p["metadata"]["name"] for p in pods]
    assert sorted(number(p) for p in pods) == [0, 1], "all pods restart together"
    assert (resumed(kube.logs(name)) or 0) >= FAULT, kube.report(name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    status = create_scheduler("test").describe(f"{kube.namespace}:{name}")
    assert (status.state.name, status.num_restarts) == ("SUCCEEDED", 1)
    assert "Restarted 1 time(s)" in status.msg
    verify(kube, name, STEPS)
    kube.run("delete", "jobset", name)


@pytest.mark.usefixtures("_controller")
def test_a_jobset_restarts_no_longer_than_its_time_limit(kube, name):
    """The pods keep the time of the first restart on the volume, where the test changes it."""
    if not kube.volume:
        pytest.skip("the volume of the runs is not on this machine")
    limited = kube.objects(
        name, fit(name, 100_000), "jobset", "time-limit", values=["timeLimit=600"]
    )
    kube.apply(limited)
    kube.at_step(name, 5)
    marks = kube.volume / name / "failures" / "restarts"
    kube.run("delete", "pod", of_node(kube, name, 1), "--wait=false")
    kube.until("a restart", lambda: resumed(kube.logs(name)) is not None, name)
    for mark in marks.iterdir():
        os.utime(mark, times=(time.time() - 601,) * 2)
    kube.run("delete", "pod", of_node(kube, name, 1), "--wait=false")
    message = until_told(kube, name, "Restarts end 600 s after the first one")
    assert "increase the limit" in message
    kube.until("the end", lambda: told(kube, name)[0] == "FAILED", name)
    kube.run("delete", "jobset", name)


@pytest.mark.usefixtures("_controller")
def test_a_jobset_whose_pods_are_not_placed_ends_at_its_time_limit(kube, name):
    values = ["timeLimit=5", "memory=60Ti"]
    kube.apply(kube.objects(name, fit(name, STEPS), "jobset", "time-limit", values=values))
    until_told(kube, name, "FailJobSet")  # it is not restarted
    until_told(kube, name, "DeadlineExceeded: Job was active longer than specified deadline")
    assert told(kube, name)[0] == "FAILED"
    kube.run("delete", "jobset", name)
