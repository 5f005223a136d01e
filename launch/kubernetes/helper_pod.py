"""Small pods that give access to the volume with the runs: they only wait for programs that
``kubectl exec`` runs in them, and are deleted at the end."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from launch.contract import RetryError, RunError, log
from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster
from launch.kubernetes.containers import Container

Object = dict[str, Any]
LIFETIME = 3600
"""Seconds after which a pod ends that nobody has deleted."""
_POLL = 1.0
_LABEL = "app.kubernetes.io/name"


def selector(kind: str) -> str:
    """Selects the pods of a kind, such as ``reader``."""
    return f"{_LABEL}=isorun-{kind}"


def helper_pod(run: str, kind: str, spec: Object) -> Object:
    """A pod for a run, with a spec whose first container only waits. It has none of the run's
    labels, so that no controller or service takes it for a pod of the run."""
    first, *others = spec["containers"]
    main = {key: value for key, value in first.items() if key != "args"}
    main["command"] = ["sleep", str(LIFETIME)]
    ends = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": LIFETIME,
        "terminationGracePeriodSeconds": 0,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{run[:44].rstrip('-')}-{kind}-{secrets.token_hex(3)}",
            "labels": {_LABEL: f"isorun-{kind}"},
        },
        "spec": {**spec, **ends, "containers": [main, *others]},
    }


def near(labels: Mapping[str, str]) -> Object:
    """Pod affinity: preferably on a node with such pods, as a volume may be usable on one node
    only."""
    term = {
        "labelSelector": {"matchLabels": dict(labels)},
        "topologyKey": "kubernetes.io/hostname",
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


@contextmanager
def running(
    cluster: Cluster,
    pod: Object,
    purpose: str,
    *,
    owner: Object | None = None,
    seconds: float,
) -> Iterator[Container]:
    """Creates a pod, which is deleted at the end and with its owner, and waits until it runs.
    ``purpose``: what it does, for errors. Raises UsageError or RetryError."""
    name = pod["metadata"]["name"]
    with _ended_by_signals():  # else the pod would stay for its lifetime
        cluster.create(pod, owner)
        try:
            found = _started(cluster, name, purpose, seconds)
            yield Container(cluster.namespace, name, state.container(found))
        finally:
            with suppress(RunError):
                cluster.delete("Pod", name)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _started(cluster: Cluster, name: str, purpose: str, seconds: float) -> Object:
    until, told = time.monotonic() + seconds, ""
    while True:
        pod = cluster.pod(name)
        if pod is None or state.has_ended(pod):
            why = (pod and state.failure(pod)) or "it is gone"
            raise RetryError(f"The pod {name}, which {purpose}, ended before it could: {why}.")
        if pod["status"].get("phase") == "Running":
            return pod
        waits = state.waiting(pod)
        if time.monotonic() > until:
            raise RetryError(
                f"The pod {name}, which {purpose}, did not start within {seconds:g} s: "
                f"{waits or 'no reason is given'}."
            )
        if waits and waits != told:
            log(f"the pod {name} waits: {waits}")
            told = waits
        time.sleep(_POLL)
