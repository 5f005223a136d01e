"""A pod of a run in which its files can be read: one that runs, or one that is made for it."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from launch.contract import RetryError, RunError, UsageError, log
from launch.kubernetes import state
from launch.pods.find import ClusterRun
from launch.pods.kubectl import Container

Object = dict[str, Any]
_START_SECONDS = 300.0
_POLL = 1.0
_LIFETIME = 3600
"""Seconds after which a pod ends that nobody has deleted."""
_RESOURCES = {"cpu": "250m", "memory": "1Gi", "ephemeral-storage": "1Gi"}


def container_of(run: ClusterRun, pod: Object) -> Container:
    """The training container of a pod."""
    return Container(run.cluster.namespace, pod["metadata"]["name"], state.container(pod))


@contextmanager
def reader(run: ClusterRun, *, own: bool = False) -> Iterator[Container]:
    """A container that sees the files of the run; with ``own``, one beside the training, whose
    memory it does not use. A pod that was made is deleted at the end. Raises UsageError or
    RetryError."""
    pod = None if own else run.running_pod()
    if pod is not None:
        yield container_of(run, pod)
        return
    made = reading_pod(run)
    name = made["metadata"]["name"]
    for number in (signal.SIGTERM, signal.SIGHUP):  # else the pod would stay for its lifetime
        signal.signal(number, _end)
    log(f"starting the pod {name}, which reads the volume of {run.name}")
    run.cluster.create_owned(made, run.workload)
    try:
        yield container_of(run, _started(run, name))
    finally:
        with suppress(RunError):
            run.cluster.delete("Pod", name)


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def reading_pod(run: ClusterRun) -> Object:
    """A pod with the image, volumes and security settings of the run that only waits. It has none
    of the run's labels, so that no controller or service takes it for a pod of the run. Raises
    UsageError."""
    template = state.pod_template(run.workload)
    if template is None:
        raise UsageError(
            f"The {run.workload['kind']} {run.name} has no template of its pods; wait until its "
            "controller has made its JobSet."
        )
    spec = {key: value for key, value in template["spec"].items() if key not in _LEFT_OUT}
    main = {key: value for key, value in spec["containers"][0].items() if key != "args"}
    main |= {"command": ["sleep", str(_LIFETIME)], "resources": _resources()}
    spec |= {
        "containers": [main],
        "initContainers": [
            {**each, "resources": _resources()} for each in spec.get("initContainers") or []
        ],
        "restartPolicy": "Never",
        "activeDeadlineSeconds": _LIFETIME,
        "terminationGracePeriodSeconds": 0,
        "affinity": _near(run.name),
    }
    name = f"{run.name[:44].rstrip('-')}-reader-{secrets.token_hex(3)}"
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": "isorun-reader"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


# What places and names the pods of a run, and needs its devices or queue.
_LEFT_OUT = (
    "affinity", "hostname", "nodeName", "priorityClassName", "resourceClaims", "schedulerName",
    "schedulingGates", "setHostnameAsFQDN", "subdomain", "topologySpreadConstraints",
)  # fmt: skip


def _resources() -> Object:
    return {"requests": dict(_RESOURCES), "limits": dict(_RESOURCES)}


def _near(name: str) -> Object:
    """Preferably on a node of the run: a volume may be usable on one node only."""
    term = {
        "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def _started(run: ClusterRun, name: str) -> Object:
    until = time.monotonic() + _START_SECONDS
    while True:
        pod = run.cluster.pod(name)
        if pod is None or state.has_ended(pod):
            why = (pod and state.failure(pod)) or "it is gone"
            raise RetryError(f"The pod {name} ended before its files could be read: {why}.")
        if pod["status"].get("phase") == "Running":
            return pod
        if time.monotonic() > until:
            why = state.waiting(pod) or "no reason is given"
            raise RetryError(
                f"The pod {name}, which reads the volume of {run.name}, did not start within "
                f"{_START_SECONDS:g} s: {why}."
            )
        time.sleep(_POLL)
