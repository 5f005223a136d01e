"""Runs in a real cluster: complete runs, and lost pods.

tests/real/kubernetes/conftest.py says in which one. The nodes of another cluster need two cores in
total.
"""

import re
import secrets

import pytest

from tests.real.kubernetes.kube import number
from tests.real.kubernetes.runs import (
    FAULT,
    NEVER,
    STEPS,
    completed,
    final_loss,
    fit,
    goes_on,
    of_node,
    resumed,
    verify,
)

# More than the timeouts within a test (SECONDS), so that a failure shows the cluster's state.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_two_pods_train_to_the_end(kube, undisturbed):
    pods = kube.pods(undisturbed)
    assert sorted(number(p) for p in pods) == [0, 1], "a pod was started twice"
    if kube.local:
        assert len({p["spec"]["nodeName"] for p in pods}) == 2, "both pods are on one node"
    log = kube.logs(undisturbed)
    assert "Preflight (quick): 2 nodes" in log, log
    assert "Placement: 2 x cpu" in log, log
    assert f"Finished: {STEPS} steps" in log, log
    # --prefix shows the pod of each line.
    selector = f"app.kubernetes.io/instance={undisturbed}"
    together = kube.run("logs", "-l", selector, "--prefix", "--tail=-1")
    assert re.search(
        rf"^\[pod/{undisturbed}-[01]-\w+/train\] Finished: {STEPS} steps", together, re.M
    ), together
    verify(kube, undisturbed, STEPS)


LONG = 2 * STEPS  # the other run may be slower to start


@pytest.fixture(scope="module")
def disturbed(kube):
    """The names of two runs that have ended: one that lost a pod, and one whose Job was deleted and
    applied again. Each waits while the other computes."""
    lost, deleted = (f"text-{secrets.token_hex(3)}" for _ in range(2))
    again = kube.objects(deleted, fit(deleted, LONG, NEVER))
    kube.apply([*kube.objects(lost, fit(lost, STEPS)), *again])
    kube.at_step(lost, FAULT)
    kube.run("delete", "pod", of_node(kube, lost, 0), "--wait=false")
    kube.at_step(deleted, FAULT)
    kube.run("delete", "job", deleted, "--wait=false")
    kube.until("the end of all pods", lambda: not kube.pods(deleted), deleted)
    kube.apply(again)
    completed(kube, lost)
    completed(kube, deleted)
    return lost, deleted


def test_after_a_pod_was_deleted_the_run_goes_on(kube, undisturbed, disturbed):
    """That of rank 0, or another: the run resumes, and the curve stays the same."""
    name, _ = disturbed
    goes_on(kube, name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS)


def test_delete_leaves_a_checkpoint_from_which_the_same_run_resumes(kube, disturbed):
    _, name = disturbed
    log = kube.logs(name)
    assert (resumed(log) or 0) >= FAULT, log
    verify(kube, name, LONG, NEVER)


def test_the_namespace_is_restricted_and_has_the_network_policy(kube, undisturbed):
    labels = kube.get("namespace", kube.namespace, namespace=False)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    root = (
        f'{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "root"}}, "spec": '
        f'{{"containers": [{{"name": "root", "image": "{kube.image}"}}]}}}}'
    )
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        kube.run("create", "-f", "-", given=root)
    (policy,) = kube.get("networkpolicies", selector=f"app.kubernetes.io/instance={undisturbed}")
    mine = {"app.kubernetes.io/instance": undisturbed}
    assert policy["spec"]["podSelector"]["matchLabels"] == mine
