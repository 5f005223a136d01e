"""Lines about a run that its own objects do not have: its queue, missing pods, ends of pods that
are gone, the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster
from launch.kubernetes.ends import ends_note
from launch.kubernetes.progress import progress_note
from launch.kubernetes.queue import queue_note

Object = dict[str, Any]


def notes(cluster: Cluster, job: Object, pods: Sequence[Object]) -> list[str]:
    """Why a run has no pods, or how far its training has got. What the user may not read, or the
    cluster does not have, is left out."""
    found: list[str | None] = []
    if job["spec"].get("suspend"):
        found.append(queue_note(job, cluster.queued()))
    elif state.lacks_pods(job, pods):
        refused = cluster.refused_pods(job["metadata"]["name"])
        found.append(f"Pods are missing: {refused}" if refused else None)
    if job["kind"] == "JobSet":
        found.append(ends_note(job, cluster.failed_attempts(job["metadata"]["name"])))
    if any(pod["status"].get("phase") == "Running" for pod in pods):
        found.append(progress_note(cluster, pods))
    return [text for text in found if text]
