"""Faults of a cluster that only a real one has: what the Job counts, limits of memory, images and
quotas, and a node without network. `torchx status` names the cause of each.
"""

import secrets
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from launch.kubernetes.scheduler import create_scheduler
from tests.real.kubernetes.kube import PLACED, exit_code, number
from tests.real.kubernetes.runs import (
    FAULT,
    STEPS,
    completed,
    final_loss,
    fit,
    goes_on,
    of_node,
    resumed,
    told,
    until_told,
    verify,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def end_with(name, *codes):
    """A command that ends with these exit codes, one after the other. It keeps its count on the
    volume."""
    place = "/runs/$JOB_COMPLETION_INDEX-$0"
    script = f"n=$(cat {place} 2>/dev/null || echo 0); echo $((n+1)) > {place}; "
    cases = " ".join(f"{n}) exit {code};;" for n, code in enumerate(codes))
    return ["sh", "-c", f"{script} case $n in {cases} esac", name]


COUNTED = {
    # Infrastructure failures and stops do not count.
    "ignored": ((75, 143, 0), 0, ("Complete", "CompletionsReached"), 3),
    # Others do, each index by itself.
    "counted": ((1, 75, 1, 0), 1, ("Failed", "MaxFailedIndexesExceeded"), 3),
    "final": ((65,), 3, ("Failed", "PodFailurePolicy"), 1),
}
MEMORY = "x = [bytearray(1 << 24) for _ in range(1 << 12)]"
SCRATCH = "dd if=/dev/zero of=/scratch/x bs=1M count=300; sleep 120"


@pytest.fixture(scope="session")
def small(kube):
    """The names of small runs by their fault. They do not disturb each other, so they are started
    together."""
    mark = secrets.token_hex(3)
    runs = {
        key: (end_with(f"{key}-{mark}", *codes), [f"retries={retries}"])
        for key, (codes, retries, _, _) in COUNTED.items()
    }
    runs["memory"] = (["python", "-c", MEMORY], ["memory=512Mi", "sharedMemory=64Mi", "retries=0"])
    runs["image"] = (["true"], ["image=registry.invalid/isorun:none"])
    # Evictions do not count, so the limit ends what would be evicted again and again.
    values = ["scratch=64Mi", "retries=0", "timeLimit=60"]
    runs["scratch"] = (["sh", "-c", SCRATCH], values, "time-limit")
    objects = []
    for key, (command, values, *components) in runs.items():
        given = ["cpu=200m", *values]
        objects += kube.objects(f"{key}-{mark}", command, *components, nodes=1, values=given)
    kube.apply(objects)
    return {key: f"{key}-{mark}" for key in runs}


@pytest.mark.parametrize("key", COUNTED)
def test_what_the_job_counts(kube, small, key):
    codes, _, end, attempts = COUNTED[key]
    assert kube.finished(small[key]) == end, kube.report(small[key])
    assert [exit_code(pod) for pod in kube.pods(small[key])] == list(codes[:attempts])


def test_a_process_beyond_the_memory_limit(kube, small):
    name = small["memory"]
    assert kube.finished(name)[0] == "Failed", kube.report(name)
    state, message = told(kube, name)
    assert state == "FAILED"
    assert "OOMKilled, it used more than its limit of memory" in message, kube.report(name)
    assert exit_code(kube.pods(name)[0]) == 137


@pytest.mark.begins
def test_an_image_that_does_not_exist(kube, small):
    name = small["image"]
    until_told(kube, name, "registry.invalid/isorun:none")
    assert told(kube, name)[0] == "PENDING"
    kube.run("delete", "job", name)


def test_a_pod_that_fills_its_scratch_space_is_evicted(kube, small):
    message = until_told(kube, small["scratch"], "Evicted: ")
    assert "exceeds the limit" in message or "exceeds its local ephemeral storage" in message
    kube.run("delete", "job", small["scratch"])


def test_a_quota_that_is_exceeded(kube, name):
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": name},
        "spec": {"hard": {"requests.memory": "1Ki"}},
    }
    kube.apply([quota])
    try:
        kube.apply(kube.objects(name, ["true"]))
        message = until_told(kube, name, "exceeded quota")
        assert f"exceeded quota: {name}, requested: requests.memory=" in message
        assert told(kube, name)[0] in ("PENDING", "SUBMITTED")
    finally:
        kube.run("delete", "quota", name)
    kube.run("delete", "job", name)


def test_a_node_without_network(kube, name, cluster, undisturbed):
    """All pods end by themselves, also those on that node, and the run goes on when the node is
    back, without anybody's help."""
    if cluster is None:
        pytest.skip("only a cluster on this machine has cables to pull")
    kube.apply(kube.objects(name, fit(name, STEPS)))
    kube.at_step(name, FAULT)
    pods = [kube.get("pod", of_node(kube, name, number)) for number in (0, 1)]
    assert all(map(is_alive, pods))
    node = pods[1]["spec"]["nodeName"]
    cluster("cut", node)
    try:
        kube.until(
            "a node that is not ready", lambda: not ready(kube.get("node", node, namespace=False)),
            name,
        )  # fmt: skip
        kube.until("the end of all ranks", lambda: not any(map(is_alive, pods)), name)
    finally:
        cluster("mend", node)
    completed(kube, name)
    assert (resumed(kube.logs(name)) or 0) >= FAULT, kube.report(name)
    codes = {exit_code(pod) for pod in kube.pods(name) if exit_code(pod)}
    assert codes <= {75, 143}, kube.report(name)
    assert {number(pod) for pod in kube.pods(name)} == {0, 1}
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS)


def is_alive(pod):
    """Whether a process of the pod's container still runs; its node is on this machine."""
    ids = [s["containerID"].rpartition("/")[2] for s in pod["status"]["containerStatuses"]]
    for file in Path("/proc").glob("[0-9]*/cgroup"):
        with suppress(OSError):
            if any(each in file.read_text() for each in ids):
                return True
    return False


def ready(node):
    conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
    return conditions["Ready"] == "True"


def test_an_api_server_that_restarts_while_a_log_is_followed(kube, name, cluster):
    """Each line is there once, and the run has not noticed."""
    if cluster is None:
        pytest.skip("only a cluster on this machine has an API server to restart")
    kube.apply(kube.objects(name, ["sh", "-c", COUNTS], nodes=1))
    kube.until("the pod", lambda: "line 3\n" in kube.logs(name), name)
    read = []
    lines = create_scheduler("test").log_iter(f"{kube.namespace}:{name}", "", 0, should_tail=True)
    for line in lines:
        read.append(line)
        if len(read) == 5:
            cluster.kill("apiserver")
            time.sleep(1)
            cluster("start", "apiserver")
            back = time.time()
    assert read == [f"line {number}\n" for number in range(1, 21)]
    assert kube.finished(name)[0] == "Complete"
    ended = kube.pods(name)[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert datetime.fromisoformat(ended["finishedAt"]).timestamp() > back, "it was not followed"


COUNTS = 'n=0; while [ $n != 20 ]; do n=$((n+1)); echo "line $n"; sleep 0.8; done'


def test_a_node_is_drained_with_a_budget_and_the_run_goes_on(kube, name, undisturbed):
    """A PodDisruptionBudget of one pod lets the nodes of a run be drained one after the other. For
    pods of a Job, Kubernetes supports minAvailable only."""
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {
            "minAvailable": 1,
            "selector": {"matchLabels": {"app.kubernetes.io/instance": name}},
        },
    }
    kube.apply([budget, *kube.objects(name, fit(name, STEPS))])
    kube.at_step(name, FAULT)
    node = kube.get("pod", of_node(kube, name, 1))["spec"]["nodeName"]
    selector = f"app.kubernetes.io/instance={name}"
    try:
        kube.run(
            "drain", node, "--pod-selector", selector, "--delete-emptydir-data", "--timeout=180s",
            namespace=False,
        )  # fmt: skip
    finally:
        kube.run("uncordon", node, namespace=False)
        kube.run("delete", "pdb", name)
    completed(kube, name)
    goes_on(kube, name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS)


def test_pods_of_a_higher_priority_take_the_place_of_a_run(kube, name, undisturbed):
    """It saves, waits for the place, and goes on when it is free again."""
    nodes = kube.get("nodes", namespace=False)
    cores = int(nodes[0]["status"]["allocatable"]["cpu"])
    urgent = f"{name}-u"
    level = {
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
        "metadata": {"name": urgent}, "value": 1000, "description": "of a test",
    }  # fmt: skip
    kube.apply([level])
    try:
        kube.apply(kube.objects(name, fit(name, STEPS)))
        kube.at_step(name, FAULT)
        # More than what is left of a node beside a pod of the run.
        values = [f"cpu={cores - 0.9:g}", f"priorityClass={urgent}"]
        command = ["sh", "-c", "sleep 3"]
        kube.apply(kube.objects(urgent, command, "priority", nodes=len(nodes), values=values))
        completed(kube, urgent)
        completed(kube, name)
    finally:
        kube.run("delete", "priorityclass", urgent, namespace=False)
    goes_on(kube, name)
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
    verify(kube, name, STEPS)


def test_a_claim_that_no_volume_satisfies(kube, name):
    objects = kube.objects(name, ["true"], nodes=1)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "none",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    job = next(each for each in objects if each["kind"] == "Job")
    for volume in job["spec"]["template"]["spec"]["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = name
    kube.apply([claim, *objects])
    try:
        until_told(kube, name, "unbound immediate PersistentVolumeClaims")
        assert told(kube, name)[0] == "PENDING"
    finally:
        kube.run("delete", "job", name)
        kube.run("delete", "pvc", name)


def test_a_late_dns_and_a_restart_of_a_kubelet_replace_no_pod(kube, name, cluster, undisturbed):
    if cluster is None:
        pytest.skip("only a cluster on this machine has a DNS and kubelets to stop")
    cluster("stop", "dns")
    try:
        kube.apply(kube.objects(name, fit(name, STEPS)))
        kube.until(
            "an agent that waits", lambda: "resolve" in kube.logs(name), name, PLACED
        )  # fmt: skip
    finally:
        cluster("start", "dns")
    kube.at_step(name, FAULT)
    pods = {pod["metadata"]["name"] for pod in kube.pods(name)}
    node = kube.get("pod", of_node(kube, name, 1))["spec"]["nodeName"]
    cluster("stop", f"kubelet-{node}")
    time.sleep(5)
    cluster("start", f"kubelet-{node}")
    completed(kube, name)
    assert {pod["metadata"]["name"] for pod in kube.pods(name)} == pods
    assert {exit_code(pod) for pod in kube.pods(name)} == {0}
    assert final_loss(kube, name) == final_loss(kube, undisturbed)
