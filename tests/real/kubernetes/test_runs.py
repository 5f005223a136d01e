"""Runs in a real cluster: to the end, through losses, and not beyond a mistake.

Needs KUBECONFIG and ISORUN_TEST_IMAGE, see tests/real/kubernetes/conftest.py. The images' nodes need
two cores between them.
"""

import re
import secrets

import pytest

from tests.real.kubernetes.kube import PLACED, exit_code, number

# `text`, but smaller: a step takes some 20 ms of a core.
SMALL = [
    "--config", "configs/text.yaml", "model.layers=1", "model.width=32", "model.heads=2",
    "data.context=32", "evaluate.every_steps=80", "checkpoint.every_steps=20",
    "track.log_every_steps=5", "track.wandb=disabled", "schedule.warmup_steps=5",
]  # fmt: skip


@pytest.fixture
def name():
    return f"text-{secrets.token_hex(3)}"


def overrides(name, steps):
    return [*SMALL, f"run.name={name}", f"length.steps={steps}"]


def fit(name, steps):
    return ["python", "-m", "train", "fit", *overrides(name, steps)]


def verify(kube, name, steps):
    log = kube.verify(name, ["python", "-m", "train", "verify", *overrides(name, steps)])
    assert f"checkpoint step {steps}: ok" in log, log
    assert "all well" in log, log


def completed(kube, name):
    kind, reason = kube.finished(name)
    assert kind == "Complete", f"{name} ended as {kind} ({reason})\n{kube.report(name)}"


def test_two_pods_train_to_the_end(kube, name):
    kube.apply(kube.objects(name, fit(name, 40)))
    completed(kube, name)
    pods = kube.pods(name)
    assert sorted(number(p) for p in pods) == [0, 1], "nobody was started twice"
    log = kube.logs(name)
    assert "Placement: 2 x cpu" in log, log
    assert "Finished: 40 steps" in log, log
    # With all pods' logs in one, the number of each is told by its name.
    selector = f"app.kubernetes.io/instance={name}"
    together = kube.run("logs", "-l", selector, "--prefix", "--tail=-1")
    assert re.search(rf"^\[pod/{name}-[01]-\w+/train\] Finished: 40 steps", together, re.M), (
        together
    )
    verify(kube, name, 40)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_pod_is_deleted_in_the_middle(kube, name, victim):
    kube.apply(kube.objects(name, fit(name, 160)))
    kube.at_step(name, 40)
    pod = next(p for p in kube.pods(name) if number(p) == victim)
    kube.run("delete", "pod", pod["metadata"]["name"], "--wait=false")
    completed(kube, name)
    goes_on(kube, name)
    verify(kube, name, 160)


def test_a_pod_is_evicted(kube, name):
    """As a node is drained."""
    kube.apply(kube.objects(name, fit(name, 160)))
    kube.at_step(name, 40)
    pod = next(p for p in kube.pods(name) if number(p) == 1)["metadata"]["name"]
    eviction = f'{{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {{"name": "{pod}"}}}}'
    path = f"/api/v1/namespaces/{kube.namespace}/pods/{pod}/eviction"
    kube.run("create", "--raw", path, "-f", "-", given=eviction, namespace=False)
    completed(kube, name)
    goes_on(kube, name)
    verify(kube, name, 160)


def goes_on(kube, name):
    """The pods that came later did not begin anew."""
    log = kube.logs(name)
    assert re.search(r"attempt [2-9]", log), f"no second attempt\n{kube.report(name)}"
    job = kube.job(name)
    failed = job["status"].get("failedIndexes", "")
    assert not failed, f"failed indexes {failed}\n{kube.report(name)}"


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


def test_delete_leaves_a_checkpoint_from_which_the_same_run_goes_on(kube, name):
    kube.apply(kube.objects(name, fit(name, 160)))
    kube.at_step(name, 40)
    kube.run("delete", "job", name, "--wait=false")
    kube.until("the end of all pods", lambda: not kube.pods(name), name)
    kube.apply(kube.objects(name, fit(name, 160)))
    completed(kube, name)
    log = kube.logs(name)
    # Where it was stopped, not where the last regular checkpoint was.
    found = re.search(r"from step (\d+)", log)
    assert found, log
    assert int(found[1]) >= 40, log
    verify(kube, name, 160)


def test_the_namespace_is_restricted_and_the_policy_in_place(kube, name):
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
    completed(kube, name)  # the pods of one run could talk to each other
