"""How the Job and JobSet controllers count failures and end, as far as our manifests and scheduler
rely on it. tests/launch/kubernetes/test_pretended.py runs these tests on the small Kubernetes of the
tests as well, so that it behaves as the real one does.
"""

import secrets
import time

import pytest

from tests.real.kubernetes.kube import PLACED, SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
INDEX = "batch.kubernetes.io/job-completion-index"
COUNTED = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
REFUSED = [64, 76]
RULES = [
    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": REFUSED}},
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
]
SKIPPED = {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [78]}}
FOREVER = "sleep 600 & wait"


def job(name, image, scripts, *, rules=RULES, **spec):
    """An Indexed Job; the pods of index n run the n-th script. There, $FAILED is the number of
    earlier failures of the index that count, and $RESTARTS that of the JobSet's restarts."""
    cases = " ".join(f"{n}) {script};;" for n, script in enumerate(scripts))
    container = {
        "name": "train",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", f"trap 'exit 143' TERM; case $AT in {cases} esac"],
        "env": [
            {"name": "AT", "valueFrom": _field(f"metadata.labels['{INDEX}']")},
            {"name": "FAILED", "valueFrom": _field(f"metadata.annotations['{COUNTED}']")},
            {"name": "RESTARTS", "valueFrom": _field(f"metadata.labels['{RESTARTS}']")},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}},
    }
    labels = {"app.kubernetes.io/instance": name}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed", "completions": len(scripts), "parallelism": len(scripts),
            "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules}, **spec,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 5,
                    "automountServiceAccountToken": False,
                    "securityContext": {
                        "runAsNonRoot": True, "runAsUser": 1000,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                },
            },
        },
    }  # fmt: skip


def _field(path):
    return {"fieldRef": {"fieldPath": path}}


# Scripts by index, and what else the Job has.
JOBS = {
    "success": (["exit 0", "exit 0"], {"backoffLimitPerIndex": 0}),
    "retried": (["exit 0", "set -- 75 1 0; shift $FAILED; exit $1"], {"backoffLimitPerIndex": 3}),
    "refused": ([FOREVER, "sleep 2; exit 64"], {"backoffLimitPerIndex": 3}),
    "exhausted": (["exit 75", FOREVER], {"backoffLimitPerIndex": 1, "maxFailedIndexes": 0}),
    "independent": (["exit 75", "sleep 5", "exit 0"], {"backoffLimitPerIndex": 0}),
    "skipped": (
        ["exit 78", "sleep 5"],
        {"backoffLimitPerIndex": 3, "rules": [*RULES, SKIPPED]},
    ),
    "in turn": (["exit 0", "exit 1", "exit 0"], {"backoffLimitPerIndex": 0, "parallelism": 1}),
    "first failure": ([FOREVER, "sleep 2; exit 1"], {"backoffLimit": 0}),
}


@pytest.fixture(scope="session")
def jobs(kube):
    """Returns a function that waits for the end of a Job of JOBS; all run at the same time."""
    names = {key: f"job-{secrets.token_hex(3)}" for key in JOBS}
    for key, (scripts, spec) in JOBS.items():
        kube.apply([job(names[key], kube.image, scripts, **spec)])

    def ended(key):
        return names[key], kube.finished(names[key], SECONDS)

    yield ended
    for name in names.values():
        kube.run("delete", "job", name, "--wait=false")


def codes(kube, name):
    """The exit codes of the pods that have ended by themselves, by index, in their order."""
    found = {}
    for pod in sorted(kube.pods(name), key=earlier_failures):
        state = (pod["status"].get("containerStatuses") or [{}])[0].get("state", {})
        if "terminated" in state and not pod["metadata"].get("deletionTimestamp"):
            index = int(pod["metadata"]["labels"][INDEX])
            found.setdefault(index, []).append(state["terminated"]["exitCode"])
    return found


def earlier_failures(pod):
    notes = pod["metadata"].get("annotations", {})
    return sum(int(notes.get(key, 0)) for key in (COUNTED, IGNORED))


@pytest.mark.begins
def test_a_job_whose_indexes_succeed_is_complete(kube, jobs):
    name, ended = jobs("success")
    assert ended[0] == "Complete"
    assert codes(kube, name) == {0: [0], 1: [0]}
    assert kube.job(name)["status"]["succeeded"] == 2


def test_failures_within_the_limit_of_their_index_are_repeated(kube, jobs):
    name, ended = jobs("retried")
    assert ended[0] == "Complete"
    assert codes(kube, name) == {0: [0], 1: [75, 1, 0]}


def test_an_exit_code_of_a_rule_fails_the_job_and_ends_the_other_pods(kube, jobs):
    name, (kind, reason) = jobs("refused")
    assert (kind, reason) == ("Failed", "PodFailurePolicy")
    assert codes(kube, name)[1] == [64]
    (condition,) = [c for c in kube.job(name)["status"]["conditions"] if c["type"] == "Failed"]
    assert "failed with exit code 64 matching FailJob rule at index 0" in condition["message"]
    assert_no_pod_stays(kube, name)


def test_more_failures_of_an_index_than_its_limit_fail_the_job(kube, jobs):
    name, (kind, reason) = jobs("exhausted")
    assert (kind, reason) == ("Failed", "MaxFailedIndexesExceeded")
    assert codes(kube, name)[0] == [75, 75]
    assert_no_pod_stays(kube, name)


@pytest.mark.parametrize("key", ["independent", "skipped", "in turn"])
def test_without_a_limit_of_failed_indexes_the_others_go_on(kube, jobs, key):
    name, (kind, reason) = jobs(key)
    assert (kind, reason) == ("Failed", "FailedIndexes")
    expected = {"independent": {0: [75], 1: [0], 2: [0]}, "skipped": {0: [78], 1: [0]},
                "in turn": {0: [0], 1: [1], 2: [0]}}  # fmt: skip
    assert codes(kube, name) == expected[key]


def test_without_a_limit_per_index_the_first_failure_can_end_the_job(kube, jobs):
    name, (kind, reason) = jobs("first failure")
    assert (kind, reason) == ("Failed", "BackoffLimitExceeded")
    assert codes(kube, name)[1] == [1]


def assert_no_pod_stays(kube, name):
    deadline = time.monotonic() + PLACED
    while running(kube, name):
        assert time.monotonic() < deadline, kube.report(name)
        time.sleep(1)


def running(kube, name):
    return [p for p in kube.pods(name) if p["status"]["phase"] == "Running"]


def jobset(name, image, script, restarts):
    """A JobSet with the failure policy of our component, whose only pod runs a script."""
    rules = [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [64, 75]}}]
    child = job(name, image, [script], rules=rules, backoffLimit=0)
    failed = {"onJobFailureReasons": ["PodFailurePolicy"]}
    refused = {**failed, "onJobFailureMessagePatterns": ["exit code (64|76) matching"]}
    policy = [
        {"name": "refused", "action": "FailJobSet", **refused},
        {"name": "machine", "action": "RestartJobSetAndIgnoreMaxRestarts", **failed},
    ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": child["metadata"],
        "spec": {
            "failurePolicy": {"maxRestarts": restarts, "rules": policy},
            "replicatedJobs": [
                {"name": "node", "replicas": 1, "template": {"spec": child["spec"]}}
            ],
        },
    }


# The script, the restarts that may count, how it ends, and after how many restarts.
JOBSETS = {
    "success": ("exit 0", 0, "Completed", 0),
    "refused": ("exit 64", 3, "Failed", 0),
    "retried": ("set -- 1 0; shift $RESTARTS; exit $1", 1, "Completed", 1),
    "exhausted": ("exit 1", 1, "Failed", 1),
    "not counted": ("set -- 75 75 0; shift $RESTARTS; exit $1", 0, "Completed", 2),
}


def jobset_end(kube, name):
    """Whether a JobSet has Completed or Failed, and after how many restarts; None before."""
    status = kube.jobset(name).get("status", {})
    for condition in status.get("conditions") or []:
        if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
            return condition["type"], status.get("restarts", 0)
    return None


@pytest.fixture(scope="session")
def jobsets(kube, cluster):
    """Returns a function that waits for the end of a JobSet of JOBSETS; all run at the same time."""
    if cluster:
        cluster.add("jobset")
    if "jobsets.jobset.x-k8s.io" not in kube.run("api-resources", "-o", "name", namespace=False):
        pytest.skip("the cluster has no JobSet controller")
    names = {key: f"jobset-{secrets.token_hex(3)}" for key in JOBSETS}
    for key, (script, restarts, *_) in JOBSETS.items():
        kube.apply([jobset(names[key], kube.image, script, restarts)])

    def ended(key):
        return kube.until("the end", lambda: jobset_end(kube, names[key]), names[key], PLACED)

    yield ended
    for name in names.values():
        kube.run("delete", "jobset", name, "--wait=false")


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.begins] * (key == "success")) for key in JOBSETS]
)
def test_a_jobset_restarts_by_the_exit_code_of_its_pods(jobsets, key):
    assert jobsets(key) == JOBSETS[key][2:]


def test_an_evicted_pod_does_not_count_and_a_suspended_job_has_no_pods(kube, name):
    kube.apply([job(name, kube.image, [FOREVER], backoffLimitPerIndex=0)])
    (first,) = kube.until("a running pod", lambda: running(kube, name), name)
    kube.evict(first["metadata"]["name"])

    def again():
        new = [p for p in running(kube, name) if p["metadata"]["uid"] != first["metadata"]["uid"]]
        return new and new[0]

    second = kube.until("a new pod", again, name)
    assert second["metadata"]["annotations"][COUNTED] == "0"
    assert second["metadata"]["annotations"][IGNORED] == "1"
    kube.run("patch", "job", name, "-p", '{"spec": {"suspend": true}}')
    kube.until("no pod", lambda: not running(kube, name), name)
    kube.run("patch", "job", name, "-p", '{"spec": {"suspend": false}}')
    kube.until("a pod", lambda: running(kube, name), name)
    kube.run("delete", "job", name, "--wait=false")
