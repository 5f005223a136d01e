"""Finds a run on a cluster by what a user calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.contract import UsageError
from launch.history.launches import all_launches
from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster, connect, current_namespace

Object = dict[str, Any]
SCHEME = "kubernetes_job://"


@dataclass(frozen=True)
class ClusterRun:
    """A workload of a namespace."""

    cluster: Cluster
    name: str
    workload: Object
    """The Job, JobSet or TrainJob."""

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.name} in the namespace {self.cluster.namespace}"

    def pods(self) -> list[Object]:
        """Its pods, the oldest first."""
        return self.cluster.pods(self.name)

    def running_pod(
        self, node: int | None = None, pods: Sequence[Object] | None = None
    ) -> Object | None:
        """The running pod of a node, by default of the first node that has one; among ``pods``
        where they are known."""
        found = self.running_pods(pods)
        return next((pod for pod in found if node in (None, state.node(pod))), None)

    def running_pods(self, pods: Sequence[Object] | None = None) -> list[Object]:
        """The running pods in the order of the nodes, among ``pods`` where they are known."""
        pods = self.pods() if pods is None else pods
        running = [p for p in pods if p["status"].get("phase") == "Running"]
        running = [p for p in running if not p["metadata"].get("deletionTimestamp")]
        return sorted(running, key=state.node)


def find_run(word: str, namespace: str | None = None) -> ClusterRun:
    """The run with this handle (``kubernetes_job://SESSION/NAMESPACE:NAME``), job id
    (``NAMESPACE:NAME``), name of a workload, or run id of a launch. Raises UsageError or
    RetryError."""
    where, name = _located(word)
    if where and namespace and where != namespace:
        raise UsageError(
            f"{word} is in the namespace {where}, but --namespace is {namespace}; remove it."
        )
    cluster = connect(where or namespace)
    if found := cluster.find(name):
        return ClusterRun(cluster, name, found)
    raise UsageError(
        f"There is no Job, JobSet or TrainJob {name} in the namespace {cluster.namespace}; "
        "finished ones are deleted after a day. `torchx list -s kubernetes_job` lists those of "
        f"the namespace {current_namespace()}."
    )


def _located(word: str) -> tuple[str | None, str]:
    """Namespace, if it is known, and name."""
    if word.startswith(SCHEME):
        job = word.removeprefix(SCHEME).partition("/")[2]
        namespace, colon, name = job.partition(":")
        if not (namespace and colon and name):
            raise UsageError(
                f"{word!r} is not the handle of a job; it has the form "
                f"{SCHEME}SESSION/NAMESPACE:NAME, as `torchx run` and `torchx list` print it."
            )
        return namespace, name
    if "://" in word:
        raise UsageError(
            f"{word!r} is not a run on Kubernetes; give a handle that starts with {SCHEME}."
        )
    if ":" in word:
        namespace, _, name = word.partition(":")
        return namespace, name
    launches = [
        each for each in all_launches()
        if word in (each.run_id, each.line["name"]) and each.handle.startswith(SCHEME)
    ]  # fmt: skip
    return _located(launches[-1].handle) if launches else (None, word)
