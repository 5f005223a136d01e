"""The log of one node of a run, from all of its pods: a restarted node has several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, TypeVar

from launch.contract import RetryError, first_line, log
from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster

Object = dict[str, Any]
T = TypeVar("T")
_POLL = 1.0  # seconds
_OUTAGE = 600.0
"""Seconds for which the cluster may not answer while a log is followed: its control plane restarts
for an upgrade."""
# How much is read again after a lost connection: the clocks of this machine and of a node differ.
_OVERLAP = timedelta(minutes=1)


def follow(
    cluster: Cluster,
    name: str,
    node: int,
    *,
    since: datetime | None = None,
    to_the_end: bool = True,
) -> Iterator[str]:
    """The lines of a node's pods, one pod after another; with ``to_the_end``, until the job has
    ended, across restarts and lost connections. Raises RetryError."""
    read: set[str] = set()
    outage = _OUTAGE if to_the_end else 0.0
    while True:
        # Read before the pods: no pod is created after the job has ended.
        over = _answer(outage, lambda: _has_ended(cluster, name)) or not to_the_end
        pods = _answer(outage, lambda: cluster.pods(name))
        pods = [pod for pod in pods if state.node(pod) == node]
        unread = [p for p in pods if p["metadata"]["uid"] not in read and state.has_started(p)]
        for pod in unread:
            if read:
                host = pod["spec"].get("nodeName")
                yield f"isorun: restarted as pod {pod['metadata']['name']} on {host}\n"
            read.add(pod["metadata"]["uid"])
            yield from _pod(cluster, pod, since, to_the_end=to_the_end)
        if over and not unread:
            return
        if not unread:
            time.sleep(_POLL)


def _pod(
    cluster: Cluster, pod: Object, since: datetime | None, *, to_the_end: bool
) -> Iterator[str]:
    """A pod's lines, each once, in the cluster's order: timestamps need not be in order. If a
    connection is lost while the pod runs, the next one starts some time earlier, and lines that
    were read are skipped."""
    name, read = pod["metadata"]["name"], _Read()
    over = not to_the_end
    while True:
        broke = False
        ago = _seconds_ago(read.newest - _OVERLAP if read.newest else since)
        try:
            for line in cluster.log(name, state.container(pod), follow=to_the_end, since=ago):
                when = time_of(line)
                if read.is_new(line, when):
                    yield line.partition(" ")[2] if when else line
        except RetryError:
            if not to_the_end:
                raise
            broke = True
        if over:
            return
        now = _answer(_OUTAGE, lambda: cluster.pod(name))
        if now is None or now["metadata"]["uid"] != pod["metadata"]["uid"]:
            return
        over = state.has_ended(now)
        if over and not broke:
            return  # after a lost connection the last lines are read again
        read.again()
        time.sleep(_POLL)


def _answer(outage: float, request: Callable[[], T]) -> T:
    """The answer to a request, which is repeated for ``outage`` seconds while the cluster does not
    answer. Raises RetryError after that."""
    until = time.monotonic() + outage
    logged = False
    while True:
        try:
            return request()
        except RetryError as error:
            if time.monotonic() > until:
                raise
            if not logged:
                log(f"waiting for the cluster: {first_line(error)}")
                logged = True
            time.sleep(_POLL)


class _Read:
    """How far a log was read, to skip that part when it is read again."""

    def __init__(self) -> None:
        self.newest: datetime | None = None
        self._last = ""
        self._until: tuple[str, datetime] | None = None

    def again(self) -> None:
        """The log is read again, from a line before the last one."""
        self._until = (self._last, self.newest) if self.newest else None

    def is_new(self, line: str, when: datetime | None) -> bool:
        """Whether a line with this timestamp comes after the lines that were read: after the last
        of them, or, since that line may be gone, with a later timestamp."""
        if self._until:
            last, newest = self._until
            if line == last:
                self._until = None
                return False
            if when is None or when <= newest:
                return False
            self._until = None
        if when:
            self._last = line
            self.newest = max(when, self.newest or when)
        return True


def time_of(line: str) -> datetime | None:
    """The timestamp before a line; None if there is none, as in messages of the cluster itself."""
    try:
        when = datetime.fromisoformat(line.partition(" ")[0])
    except ValueError:
        return None
    return when if when.tzinfo else None


def _seconds_ago(when: datetime | None) -> int | None:
    """Rounded up, at least 1: the API rejects 0."""
    if when is None:
        return None
    return max(1, int((datetime.now(when.tzinfo) - when).total_seconds()) + 1)


def _has_ended(cluster: Cluster, name: str) -> bool:
    from torchx.specs import is_terminal

    job = cluster.find(name)
    return job is None or is_terminal(state.app_state(job))
