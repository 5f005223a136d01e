"""Runs in a real cluster: complete runs, lost pods and config errors.

Needs KUBECONFIG and ISORUN_TEST_IMAGE, see tests/real/kubernetes/conftest.py. The cluster's nodes
need two cores in total.
"""

import re
import secrets

import pytest

from tests.real.kubernetes.kube import PLACED, exit_code, number
from tests.support.controllers import COUNTED, IGNORED

# More than the timeouts within a test (SECONDS), so that a failure shows the cluster's state.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# `text`, but smaller: a step takes about 6 ms or more.
SMALL = [
    "--config", "configs/text.yaml", "model.layers=1", "model.width=32", "model.heads=2",
    "data.context=32", "evaluate.every_steps=500", "checkpoint.every_steps=20",
    "track.log_every_steps=5", "track.wandb=disabled", "schedule.warmup_steps=5",
]  # fmt: skip
# For runs with a fault at step 40, which must come before their end.
STEPS = 1500
# For stopped runs: they can resume only from the checkpoint of the stop.
NEVER = "checkpoint.every_steps=100000"


@pytest.fixture
def name():
    return f"text-{secrets.token_hex(3)}"


def overrides(name, steps, *more):
    return [*SMALL, f"run.name={name}", f"length.steps={steps}", *more]


def fit(name, steps, *more):
    return ["python", "-m", "train", "fit", *overrides(name, steps, *more)]


def verify(kube, name, steps, *more):
    log = kube.verify(name, ["python", "-m", "train", "verify", *overrides(name, steps, *more)])
    assert f"checkpoint step {steps}: ok" in log, log
    assert "all well" in log, log


def completed(kube, name):
    kind, reason = kube.finished(name)
    assert kind == "Complete", f"{name} ended as {kind} ({reason})\n{kube.report(name)}"


def test_two_pods_train_to_the_end(kube, name):
    kube.apply(kube.objects(name, fit(name, 40)))
    completed(kube, name)
    pods = kube.pods(name)
    assert sorted(number(p) for p in pods) == [0, 1], "a pod was started twice"
    log = kube.logs(name)
    assert "Placement: 2 x cpu" in log, log
    assert "Finished: 40 steps" in log, log
    # --prefix shows the pod of each line.
    selector = f"app.kubernetes.io/instance={name}"
    together = kube.run("logs", "-l", selector, "--prefix", "--tail=-1")
    assert re.search(rf"^\[pod/{name}-[01]-\w+/train\] Finished: 40 steps", together, re.M), (
        together
    )
    verify(kube, name, 40)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_pod_is_deleted_during_the_run(kube, name, victim):
    kube.apply(kube.objects(name, fit(name, STEPS)))
    kube.at_step(name, 40)
    pod = next(p for p in kube.pods(name) if number(p) == victim)
    kube.run("delete", "pod", pod["metadata"]["name"], "--wait=false")
    completed(kube, name)
    goes_on(kube, name)
    verify(kube, name, STEPS)


def test_a_pod_is_evicted(kube, name):
    kube.apply(kube.objects(name, fit(name, STEPS)))
    kube.at_step(name, 40)
    kube.evict(next(p for p in kube.pods(name) if number(p) == 1)["metadata"]["name"])
    completed(kube, name)
    goes_on(kube, name)
    verify(kube, name, STEPS)


def goes_on(kube, job):
    """Later pods resumed the run, and the end of earlier ones did not count as a failure."""
    step = resumed(kube.logs(job))
    assert step is not None, f"no second attempt\n{kube.report(job)}"
    assert step > 0, f"started from the beginning\n{kube.report(job)}"
    pods = kube.pods(job)
    newest = {number(pod): pod["metadata"].get("annotations", {}) for pod in pods}
    assert {index: found.get(COUNTED) for index, found in newest.items()} == {0: "0", 1: "0"}, (
        kube.report(job)
    )
    assert any(int(found.get(IGNORED, 0)) > 0 for found in newest.values()), kube.report(job)
    assert not kube.job(job)["status"].get("failedIndexes"), kube.report(job)


def resumed(log):
    """The step from which a later attempt resumed."""
    found = re.search(r"resumes at step (\d+) \(attempt [2-9]", log)
    return int(found[1]) if found else None


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
    kube.at_step(name, 40)
    kube.run("delete", "job", name, "--wait=false")
    kube.until("the end of all pods", lambda: not kube.pods(name), name)
    kube.apply(kube.objects(name, fit(name, STEPS, NEVER)))
    completed(kube, name)
    log = kube.logs(name)
    assert (resumed(log) or 0) >= 40, log
    verify(kube, name, STEPS, NEVER)


def test_the_namespace_is_restricted_and_has_the_network_policy(kube, name):
    labels = kube.get("namespace", kube.namespace, namespace=False)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    root = (
        f'{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "root"}}, "spec": '
        f'{{"containers": [{{"name": "root", "image": "{kube.image}"}}]}}}}'
    )
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        kube.run("create", "-f", "-", given=root)
    kube.apply(kube.objects(name, fit(name, 20)))
    (policy,) = kube.get("networkpolicies", selector=f"app.kubernetes.io/instance={name}")
    mine = {"app.kubernetes.io/instance": name}
    assert policy["spec"]["podSelector"]["matchLabels"] == mine
    completed(kube, name)  # so the policy lets the pods of a run connect
