"""The state of a job, from the job object and its pods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from launch.agent_command import variable
from launch.failure_record import sentence
from launch.kubernetes import rules
from launch.kubernetes.from_torchx import ROLE

if TYPE_CHECKING:
    from torchx.schedulers.api import DescribeAppResponse
    from torchx.specs import AppState, ReplicaState

Object = dict[str, Any]
_LATE = 30.0
"""Seconds after its grace period for which the kubelet may take to report a pod's end."""
_RESTART_DEADLINE = variable("restart-deadline")
CANCELLED = "isorun/cancelled"  # annotation set by `torchx cancel`


def app_state(job: Object, pods: Sequence[Object] = ()) -> AppState:
    """The state of a Job, JobSet or TrainJob. Without the pods, RUNNING and PENDING are
    distinguished by the status of the object only."""
    from torchx.specs import AppState

    conditions = _conditions(job)
    if conditions & {"Complete", "Completed"}:
        return AppState.SUCCEEDED
    if "Failed" in conditions:
        return AppState.FAILED
    metadata, spec, status = job["metadata"], job["spec"], job.get("status") or {}
    if metadata.get("deletionTimestamp") or CANCELLED in (metadata.get("annotations") or {}):
        return AppState.CANCELLED
    if spec.get("suspend"):
        return AppState.PENDING  # in a queue
    running = any(pod["status"].get("phase") == "Running" for pod in pods)
    ready = status.get("ready") or sum(j.get("ready", 0) for j in _replicated(status))
    if running or ready:
        return AppState.RUNNING
    return AppState.PENDING if pods or status else AppState.SUBMITTED


def lacks_pods(job: Object, pods: Sequence[Object]) -> bool:
    """Whether a job that should run has fewer pods than nodes."""
    if job["spec"].get("suspend") or _conditions(job) & {"Complete", "Completed", "Failed"}:
        return False
    spec = _job_spec(job)
    nodes = min(_nodes(job), int(spec.get("parallelism") or 1))
    return len({node(pod) for pod in pods}) < nodes


def describe(
    app_id: str, job: Object, pods: Sequence[Object], notes: Sequence[str] = ()
) -> DescribeAppResponse:
    """The response for TorchX; ``notes`` are further lines about the run."""
    from torchx.schedulers.api import DescribeAppResponse
    from torchx.specs import ReplicaStatus, Role, RoleStatus

    role = (job["metadata"].get("labels") or {}).get(ROLE, "train")
    nodes = _nodes(job)
    newest = {node(pod): pod for pod in pods}  # sorted by age: the newest wins
    replicas = [
        ReplicaStatus(
            id=index,
            state=_replica_state(newest.get(index)),
            role=role,
            hostname=_host(newest.get(index)),
            structured_error_msg=_structured(newest.get(index)),
        )
        for index in range(nodes)
    ]
    return DescribeAppResponse(
        app_id=app_id,
        state=app_state(job, pods),
        num_restarts=restarts(job, pods),
        msg=message(job, pods, notes),
        roles=[Role(name=role, image=_image(job, pods), num_replicas=nodes)],
        roles_statuses=[RoleStatus(role, replicas)],
    )


def restarts(job: Object, pods: Sequence[Object]) -> int:
    """Restarts of the job: the JobSet's count, else the pods of the node that has most, minus 1."""
    status = job.get("status") or {}
    if job["kind"] == "JobSet":
        return int(status.get("restarts", 0))
    counts: dict[int, int] = {}
    for pod in pods:
        counts[node(pod)] = counts.get(node(pod), 0) + 1
    return max(counts.values(), default=1) - 1


def message(job: Object, pods: Sequence[Object], notes: Sequence[str] = ()) -> str:
    """Why the job failed or does not run, in a few lines, and ``notes``; without any ``<NONE>``, as
    TorchX prints it."""
    lines: list[str] = []
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Failed" and condition["status"] == "True":
            lines.append(f"{condition.get('reason')}: {condition.get('message')}")
    lines += notes
    if job["kind"] == "JobSet" and (times := restarts(job, pods)):
        lines.append(
            f"Restarted {times} time(s){_restart_deadline(job)}. The pods before are gone; what "
            "ended them is in failures/ in the run directory, and at the start of node 0's log."
        )
    for pod in pods:
        name = pod["metadata"]["name"]
        if text := failure(pod):
            lines.append(f"{name} (exit {exit_code(pod)}): {text}")
        elif reason := waiting(pod) or _overdue(pod):
            lines.append(f"{name}: {reason}")
    return "\n".join(lines) or "<NONE>"


def exit_codes(pods: Sequence[Object]) -> list[int]:
    """The exit codes of the nodes' newest pods, without those that still run."""
    newest = {node(pod): exit_code(pod) for pod in pods}
    return [code for _, code in sorted(newest.items()) if code is not None]


def exit_code(pod: Object) -> int | None:
    """The exit code of the training container, or of an init container that failed; None while they
    run."""
    ended = _ended(pod)
    return int(ended["exitCode"]) if ended else None


def node(pod: Object) -> int:
    """The pod's completion index, which is the node's rank."""
    metadata = pod["metadata"]
    for place in ("labels", "annotations"):
        if (found := (metadata.get(place) or {}).get(rules.INDEX)) is not None:
            return int(found)
    return 0


def has_started(pod: Object) -> bool:
    """Whether a container has started, so that there is a log."""
    states = [c.get("state") or {} for c in pod["status"].get("containerStatuses") or []]
    return any("running" in state or "terminated" in state for state in states)


def has_ended(pod: Object) -> bool:
    """Whether all containers of the pod have ended."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def container(pod: Object) -> str:
    """The name of the training container."""
    return str(pod["spec"]["containers"][0]["name"])


def pod_template(job: Object) -> Object | None:
    """The template of the pods of a Job or JobSet; None for a TrainJob, which has none."""
    found: Object | None = _job_in(job).get("template")
    return found


def _conditions(job: Object) -> set[str]:
    found = (job.get("status") or {}).get("conditions") or []
    return {c["type"] for c in found if c["status"] == "True"}


def _replicated(status: Object) -> list[Object]:
    """The states of the Jobs in a JobSet or TrainJob."""
    return status.get("replicatedJobsStatus") or status.get("jobsStatus") or []


def _job_in(job: Object) -> Object:
    """The spec of the object, or of the Job in a JobSet."""
    spec: Object = job["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"] if job["kind"] == "JobSet" else spec


def _job_spec(job: Object) -> Object:
    """The spec of a Job, or of that in a JobSet or TrainJob."""
    spec = _job_in(job)
    if job["kind"] == "TrainJob":
        nodes = spec["trainer"].get("numNodes") or 1
        spec = {"completions": nodes, "parallelism": nodes}
    return spec


def _nodes(job: Object) -> int:
    return int(_job_spec(job).get("completions") or 1)


def _restart_deadline(job: Object) -> str:
    """When restarts end, in words; empty if the pods have no such limit."""
    env = _job_spec(job)["template"]["spec"]["containers"][0].get("env") or []
    limit = next((item.get("value") for item in env if item["name"] == _RESTART_DEADLINE), None)
    return f"; restarts end {limit} s after the first" if limit else ""


def _image(job: Object, pods: Sequence[Object]) -> str:
    return str(pods[-1]["spec"]["containers"][0]["image"]) if pods else ""


def _replica_state(pod: Object | None) -> ReplicaState:
    from torchx.specs import ReplicaState

    phase = pod["status"].get("phase") if pod else None
    return {
        "Pending": ReplicaState.PENDING,
        "Running": ReplicaState.RUNNING,
        "Succeeded": ReplicaState.SUCCEEDED,
        "Failed": ReplicaState.FAILED,
        None: ReplicaState.PENDING,
    }.get(phase, ReplicaState.UNKNOWN)


def _host(pod: Object | None) -> str:
    return str(pod["spec"].get("nodeName") or "") if pod else ""


def _overdue(pod: Object) -> str | None:
    """That a deleted pod does not end; None for others. Nothing replaces it before, since two pods
    could write one run."""
    deleted = pod["metadata"].get("deletionTimestamp")  # with the grace period
    if not deleted or has_ended(pod):
        return None
    late = (datetime.now(UTC) - datetime.fromisoformat(deleted)).total_seconds()
    if late < _LATE:
        return None
    return (
        f"it should have ended {late:.0f} s ago, but {_host(pod) or 'its node'} has not reported "
        "its end, for which the run waits; see Terminating in docs/kubernetes.md"
    )


def _ended(pod: Object) -> Object | None:
    for status in pod["status"].get("initContainerStatuses") or []:
        if (ended := (status.get("state") or {}).get("terminated")) and ended["exitCode"]:
            return dict(ended)
    for status in pod["status"].get("containerStatuses") or []:
        if status["name"] == container(pod) and (
            ended := (status.get("state") or {}).get("terminated")
        ):
            return dict(ended)
    return None


def failure(pod: Object | None) -> str | None:
    """The termination message, which is the agent's failure record or the end of the log; else the
    kubelet's reason."""
    if pod is None:
        return None
    ended = _ended(pod)
    status = pod["status"]
    whole = f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")
    if ended and ended["exitCode"]:
        text, reason = _in_words(str(ended.get("message") or "").strip()), ended.get("reason")
        if reason == "OOMKilled":
            memory = "OOMKilled, it used more than its limit of memory"
            return f"{memory}; {text}" if text else memory
        # Such as an eviction, after which the container ends as at any stop.
        return "; ".join(filter(None, (whole, text))) or reason or None
    return whole or None if status.get("phase") == "Failed" else None


def _in_words(text: str) -> str:
    """The agent's failure record as a sentence; other text unchanged."""
    try:
        return sentence(json.loads(text))
    except (ValueError, TypeError, KeyError):
        return text


def _structured(pod: Object | None) -> str:
    """A failure in the format of torch's error file, which all versions of TorchX print."""
    if pod is None or not (text := failure(pod)):
        return "<NONE>"
    ended = _ended(pod) or {}
    when = datetime.fromisoformat(ended.get("finishedAt") or pod["metadata"]["creationTimestamp"])
    extra = {"timestamp": int(when.timestamp())}
    error = {"message": text, "errorCode": ended.get("exitCode"), "extraInfo": extra}
    return json.dumps({"message": error})


def waiting(pod: Object) -> str | None:
    """Why a pod does not start; None for normal reasons."""
    kinds = ("initContainerStatuses", "containerStatuses")
    for status in [each for kind in kinds for each in pod["status"].get(kind) or []]:
        wait = (status.get("state") or {}).get("waiting") or {}
        if wait.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{wait['reason']}: {wait.get('message', '')}".rstrip(": ")
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message')}"
    return None
