"""A pod of a run in which its files can be read: one that runs, or one that is made for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launch.contract import UsageError, log
from launch.kubernetes import helper_pod, state
from launch.kubernetes.containers import Container
from launch.pods.find import ClusterRun

Object = dict[str, Any]
_START_SECONDS = 300.0
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
    log(f"starting the pod {made['metadata']['name']}, which reads the volume of {run.name}")
    purpose = f"reads the volume of {run.name}"
    with helper_pod.running(
        run.cluster, made, purpose, owner=run.workload, seconds=_START_SECONDS
    ) as container:
        yield container


def reading_pod(run: ClusterRun) -> Object:
    """A pod with the image, volumes and security settings of the run that only waits. Raises
    UsageError."""
    template = state.pod_template(run.workload)
    if template is None:
        raise UsageError(
            f"The {run.workload['kind']} {run.name} has no template of its pods; wait until its "
            "controller has made its JobSet."
        )
    spec = {key: value for key, value in template["spec"].items() if key not in _LEFT_OUT}
    spec |= {
        "containers": [{**spec["containers"][0], "resources": _resources()}],
        "initContainers": [
            {**each, "resources": _resources()} for each in spec.get("initContainers") or []
        ],
        "affinity": helper_pod.near({"app.kubernetes.io/instance": run.name}),
    }
    return helper_pod.helper_pod(run.name, "reader", spec)


# What places and names the pods of a run, and needs its devices or queue.
_LEFT_OUT = (
    "affinity", "hostname", "nodeName", "priorityClassName", "resourceClaims", "schedulerName",
    "schedulingGates", "setHostnameAsFQDN", "subdomain", "topologySpreadConstraints",
)  # fmt: skip


def _resources() -> Object:
    return {"requests": dict(_RESOURCES), "limits": dict(_RESOURCES)}
