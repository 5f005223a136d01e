"""The log of one node of a run, over all the pods that have been that node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster
from train.exits import RetryError

Object = dict[str, Any]
_POLL = 1.0  # seconds


def follow(
    cluster: Cluster,
    name: str,
    node: int,
    *,
    since: datetime | None = None,
    to_the_end: bool = True,
) -> Iterator[str]:
    """The lines of a node's pods, one pod after another; with ``to_the_end``, until the job is
    over, through restarts and through connections that break. Raises RetryError."""
    read: set[str] = set()
    while True:
        # Asked before the pods are looked at: no pod comes into being after the job is over.
        over = _is_over(cluster, name) or not to_the_end
        pods = [p for p in cluster.pods(name) if state.node(p) == node]
        unread = [p for p in pods if p["metadata"]["uid"] not in read and state.has_started(p)]
        for pod in unread:
            if read:
                host = pod["spec"].get("nodeName")
                yield f"isorun: started again as pod {pod['metadata']['name']} on {host}\n"
            read.add(pod["metadata"]["uid"])
            yield from _pod(cluster, pod, since, to_the_end=to_the_end)
        if over and not unread:
            return
        if not unread:
            time.sleep(_POLL)


def _pod(
    cluster: Cluster, pod: Object, since: datetime | None, *, to_the_end: bool
) -> Iterator[str]:
    """A pod's lines, once each. A connection may break while the pod goes on: then what was read
    already is passed over, by the times that the cluster puts before lines."""
    name, last = pod["metadata"]["name"], ""
    while True:
        ago = _seconds_ago(datetime.fromisoformat(last[:19] + "+00:00") if last else since)
        try:
            for line in cluster.log(name, state.container(pod), follow=to_the_end, since=ago):
                when, _, text = line.partition(" ")
                if when > last:
                    last = when
                    yield text
        except RetryError:
            if not to_the_end:
                raise
        if not to_the_end:
            return
        now = cluster.pod(name)
        if now is None or now["metadata"]["uid"] != pod["metadata"]["uid"] or state.has_ended(now):
            return
        time.sleep(_POLL)


def _seconds_ago(when: datetime | None) -> int | None:
    """Rounded up, and never none: the cluster refuses 0."""
    if when is None:
        return None
    return max(1, int((datetime.now(when.tzinfo) - when).total_seconds()) + 1)


def _is_over(cluster: Cluster, name: str) -> bool:
    from torchx.specs import is_terminal

    job = cluster.find(name)
    return job is None or is_terminal(state.app_state(job))
