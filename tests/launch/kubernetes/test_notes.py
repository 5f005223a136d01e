"""What a status tells besides the state: the queue of Kueue, and the last step."""

from datetime import UTC, datetime, timedelta

import pytest

from launch.kubernetes import cluster as cluster_api
from launch.kubernetes.ends import ends_note
from launch.kubernetes.notes import notes
from launch.kubernetes.queue import queue_note
from launch.kubernetes.state import message

JOB = {"kind": "Job", "metadata": {"name": "mine", "uid": "1"}, "spec": {"suspend": True}}
NO_QUOTA = ("QuotaReserved", "False", "Pending", "insufficient unused quota for cpu, 2 more needed")


def workload(uid, *conditions, age=0, priority=0, queue="research"):
    names = ("type", "status", "reason", "message")
    return {
        "metadata": {
            "ownerReferences": [{"uid": uid}],
            "creationTimestamp": f"2026-11-27T10:00:{60 - age:02}Z"
            if age
            else "2026-11-27T11:00:00Z",
        },
        "spec": {"queueName": queue, "priority": priority},
        "status": {"conditions": [dict(zip(names, each, strict=True)) for each in conditions]},
    }


@pytest.mark.parametrize(
    ("others", "place"),
    [
        ([], "position 1 of 1"),
        ([workload("2", NO_QUOTA, age=5)], "position 2 of 2"),
        ([workload("2", NO_QUOTA, age=5, priority=-1)], "position 1 of 2"),
        ([workload("2", NO_QUOTA, priority=7), workload("3", age=9)], "position 3 of 3"),
        ([workload("2", age=5, queue="other")], "position 1 of 1"),
        ([workload("2", ("Admitted", "True", "Admitted", ""), age=5)], "position 1 of 1"),
        ([workload("2", ("Finished", "True", "Succeeded", ""), age=5)], "position 1 of 1"),
    ],
)
def test_the_position_is_by_priority_then_by_age(others, place):
    said = queue_note(JOB, [*others, workload("1", NO_QUOTA)])
    assert said == (
        f"Waits in the queue research, {place} in this namespace; "
        "Pending: insufficient unused quota for cpu, 2 more needed"
    )


def test_a_preempted_run_says_by_what():
    evicted = ("Evicted", "True", "Preempted", "Preempted to accommodate a workload")
    said = queue_note(JOB, [workload("1", evicted, NO_QUOTA)])
    assert "; Preempted: Preempted to accommodate a workload; Pending: insuff" in said


def test_a_job_set_of_a_train_job_waits_where_its_owner_does():
    owner = {"kind": "TrainJob", "uid": "9"}
    inner = {**JOB, "metadata": {"name": "mine", "uid": "1", "ownerReferences": [owner]}}
    assert "position 1 of 1" in queue_note(inner, [workload("9", NO_QUOTA)])


@pytest.mark.parametrize(
    "workloads", [[], [workload("2")], [workload("1", ("Admitted", "True", "Admitted", ""))]]
)
def test_a_run_that_waits_in_no_queue_has_no_note(workloads):
    assert queue_note(JOB, workloads) is None


class Logs:
    """A cluster with the logs of pods."""

    def __init__(self, logs):
        self._logs = logs

    def log(self, pod, *_, **__):
        if isinstance(self._logs[pod], Exception):
            raise self._logs[pod]
        return iter(self._logs[pod])

    def queued(self):
        return []

    def refused_pods(self, _):
        return ""


def pod(name, phase="Running"):
    index = {"batch.kubernetes.io/job-completion-index": name}
    return {
        "metadata": {"name": name, "labels": index},
        "spec": {"containers": [{"name": "train"}]},
        "status": {"phase": phase},
    }


RUNNING = {
    "kind": "Job", "metadata": {"name": "mine"}, "spec": {"completions": 2, "parallelism": 2},
}  # fmt: skip


def line(text, ago=0):
    when = datetime.now(UTC) - timedelta(seconds=ago)
    return f"{when.isoformat()} {text}\n"


def test_the_last_step_is_that_of_the_pod_that_logs_it():
    said = [line("step 10/60  loss 3", 90), line("step 20/60  loss 2", 45), line("evaluated")]
    cluster = Logs({"0": [line("no step 3/60")], "1": said})
    (found,) = notes(cluster, RUNNING, [pod("0"), pod("1")])
    assert found in (f"Step 20 of 60, logged {s} s ago" for s in (45, 46, 47))


@pytest.mark.parametrize(
    "logs",
    [{"0": [], "1": [line("nothing")]}, {"0": cluster_api.RetryError("lost"), "1": []}],
)
def test_without_a_step_in_a_log_there_is_no_note(logs):
    assert notes(Logs(logs), RUNNING, [pod("0"), pod("1")]) == []


def test_logs_of_pods_that_do_not_run_are_not_read():
    assert notes(Logs({}), RUNNING, [pod("0", "Pending"), pod("1", "Succeeded")]) == []


JOBSET = {"kind": "JobSet", "metadata": {"name": "a", "creationTimestamp": "2026-11-27T10:00:00Z"}}
WORDS = "Container train for pod ml/a-node-0-1-x failed with exit code 75 matching FailJob rule at index 1"


def failed(minute, message=WORDS, reason="PodFailurePolicy"):
    return {"reason": reason, "message": message, "lastTimestamp": f"2026-11-27T10:{minute:02}:07Z"}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (failed(1), "2026-11-27 10:01:07 exit code 75 in the pod a-node-0-1-x"),
        (
            failed(1, "Pod ml/a-node-0-1-x has condition DisruptionTarget matching FailJob rule at index 2"),
            "2026-11-27 10:01:07 disruption (such as a drain, eviction or preemption) of the pod a-node-0-1-x",
        ),
        (
            failed(2, "Job was active longer than specified deadline", "DeadlineExceeded"),
            "2026-11-27 10:02:07 DeadlineExceeded: Job was active longer than specified deadline",
        ),
    ],
)  # fmt: skip
def test_what_ended_an_attempt_is_told_after_its_pods_are_gone(event, said):
    assert ends_note(JOBSET, [event]) == f"Attempts ended: {said}"


def test_only_the_newest_ends_are_told_and_none_of_another_jobset_of_this_name():
    old = {**failed(1), "lastTimestamp": "2026-11-27T09:59:59Z"}
    assert ends_note(JOBSET, [old]) is None
    said = ends_note(JOBSET, [old, *(failed(minute) for minute in range(1, 9))])
    assert "10:03" not in said
    assert said.count("exit code 75") == 5
    assert said.endswith("10:08:07 exit code 75 in the pod a-node-0-1-x; and 3 before")


def test_a_deleted_pod_whose_node_does_not_report_its_end_is_named():
    gone = pod("0")
    gone["spec"]["nodeName"] = "node-b"
    for seconds, said in ((10, False), (300, True)):
        since = datetime.now(UTC) - timedelta(seconds=seconds)
        gone["metadata"]["deletionTimestamp"] = since.strftime("%Y-%m-%dT%H:%M:%SZ")
        assert ("but node-b has not reported its end" in message(RUNNING, [gone])) is said
