"""A run in a queue, by the real Kueue: suspended, admitted, preempted, resumed."""

import secrets

import pytest
from yaml import safe_dump_all as dump

from tests.real.kubernetes.kube import PLACED
from tests.real.kubernetes.runs import (
    FAULT,
    NEVER,
    STEPS,
    completed,
    final_loss,
    fit,
    resumed,
    told,
    verify,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CRD = "workloads.kueue.x-k8s.io"
API = "kueue.x-k8s.io/v1beta2"


@pytest.fixture
def queue(kube, cluster):
    """The name of a LocalQueue with the quota of one run of two pods, and of two priorities, with
    `-low` and `-high` after it."""
    if cluster:
        cluster.add("kueue")
    if CRD not in kube.run("get", "crd", "-o", "name", namespace=False):
        pytest.skip(f"the cluster has no {CRD}")
    name = f"isorun-{secrets.token_hex(3)}"
    quota = {"cpu": "2", "memory": "16Gi", "ephemeral-storage": "100Gi"}
    resources = [{"name": key, "nominalQuota": value} for key, value in quota.items()]
    group = {"coveredResources": list(quota), "flavors": [{"name": name, "resources": resources}]}
    made = [
        {"kind": "ResourceFlavor", "metadata": {"name": name}},
        {
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": kube.namespace}},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [group],
            },
        },
        {"kind": "LocalQueue", "metadata": {"name": name}, "spec": {"clusterQueue": name}},
        *(
            {
                "kind": "WorkloadPriorityClass", "metadata": {"name": f"{name}-{level}"},
                "value": value, "description": "of a test",
            }
            for level, value in (("low", 100), ("high", 1000))
        ),
    ]  # fmt: skip
    objects = [{"apiVersion": API, **each} for each in made]
    kube.until("the webhooks of Kueue", lambda: "created" in kube.create(objects[:1]), "none", 300)
    kube.apply(objects[1:])
    yield name
    for each in reversed(made):
        kind, which = each["kind"].lower(), each["metadata"]["name"]
        kube.run("delete", kind, which, "--wait=false", check=False)


def submit(kube, name, queue, level, command):
    """A run of two pods in the queue."""
    values = [f"queue={queue}", f"queuePriority={queue}-{level}"]
    objects = kube.objects(name, command, "kueue", values=values)

    def accepted():
        return f"job.batch/{name} " in kube.run(
            "apply", "-f", "-", given=dump(objects), check=False
        )

    kube.until("the webhook of Kueue for Jobs", accepted, "none", 300)


def test_a_preempted_run_waits_in_its_queue_and_goes_on(kube, queue, name, undisturbed):
    submit(kube, name, queue, "low", fit(name, STEPS, NEVER))
    kube.at_step(name, FAULT)
    urgent, waiting = f"{name}-u", f"{name}-w"
    submit(kube, urgent, queue, "high", ["sh", "-c", "sleep 8"])
    submit(kube, waiting, queue, "low", ["true"])

    def preempted():
        state, message = told(kube, name)
        return (
            state == "PENDING"
            and f"Waits in the queue {queue}, position 1 of 2 in this namespace" in message
            and "Preempted: " in message
        )

    kube.until("the preemption", preempted, name, PLACED)
    assert "position 2 of 2" in told(kube, waiting)[1]
    completed(kube, urgent)
    completed(kube, name)
    assert (resumed(kube.logs(name)) or 0) >= FAULT, kube.report(name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS, NEVER)
    completed(kube, waiting)
