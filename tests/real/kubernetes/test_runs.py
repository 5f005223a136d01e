"""Runs in a real cluster: complete runs, lost pods and config errors.

tests/real/kubernetes/conftest.py says in which one. The nodes of another cluster need two cores in
total.
"""

import re

import pytest

from tests.real.kubernetes.kube import PLACED, exit_code, number
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


def test_a_pod_is_deleted_during_the_run(kube, name, undisturbed):
    """That of rank 0, or another: the run resumes, and the curve stays the same."""
    kube.apply(kube.objects(name, fit(name, STEPS)))
    kube.at_step(name, FAULT)
    kube.run("delete", "pod", of_node(kube, name, 0), "--wait=false")
    completed(kube, name)
    goes_on(kube, name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS)


def test_a_config_error_fails_the_job_at_once(kube, name):
    kube.apply(kube.objects(name, fit(name, 40), spoil="optim.lrr=1"))
    kind, reason = kube.finished(name, PLACED)
    assert (kind, reason) == ("Failed", "PodFailurePolicy"), kube.report(name)
    pods = kube.pods(name)
    numbers = [number(p) for p in pods]
    assert len(numbers) == len(set(numbers)), f"retried\n{kube.report(name)}"
    assert 64 in [exit_code(p) for p in pods], kube.report(name)
    said = [s["state"].get("terminated", {}).get("message", "") for p in pods
            for s in p["status"].get("containerStatuses", [])]  # fmt: skip
    assert any("optim.lrr is not a known key" in text for text in said), said


def test_delete_leaves_a_checkpoint_from_which_the_same_run_resumes(kube, name):
    kube.apply(kube.objects(name, fit(name, STEPS, NEVER)))
    kube.at_step(name, FAULT)
    kube.run("delete", "job", name, "--wait=false")
    kube.until("the end of all pods", lambda: not kube.pods(name), name)
    kube.apply(kube.objects(name, fit(name, STEPS, NEVER)))
    completed(kube, name)
    log = kube.logs(name)
    assert (resumed(log) or 0) >= FAULT, log
    verify(kube, name, STEPS, NEVER)


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
