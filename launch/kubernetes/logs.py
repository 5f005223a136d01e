"""The log of one node of a run, over all the pods that have been that node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from launch.contract import RetryError
from launch.kubernetes import state
from launch.kubernetes.cluster import Cluster

Object = dict[str, Any]
_POLL = 1.0  # seconds
# So much is read again after a connection broke: the clocks of this machine and of a node differ.
_OVERLAP = timedelta(minutes=1)


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
    """A pod's lines, once each, in the order in which the cluster has them: their times need not
    be in order. A connection may break while the pod goes on; the next one begins some time before
    that, and what was read already is passed over."""
    name, read = pod["metadata"]["name"], _Read()
    over = not to_the_end
    while True:
        broke = False
        ago = _seconds_ago(read.newest - _OVERLAP if read.newest else since)
        try:
            for line in cluster.log(name, state.container(pod), follow=to_the_end, since=ago):
                when = _time(line)
                if read.is_new(line, when):
                    yield line.partition(" ")[2] if when else line
        except RetryError:
            if not to_the_end:
                raise
            broke = True
        if over:
            return
        now = cluster.pod(name)
        if now is None or now["metadata"]["uid"] != pod["metadata"]["uid"]:
            return
        over = state.has_ended(now)
        if over and not broke:
            return  # else its last lines are still to be read
        read.again()
        time.sleep(_POLL)


class _Read:
    """What was read of a log, to know the rest of it when it is read again."""

    def __init__(self) -> None:
        self.newest: datetime | None = None
        self._last = ""
        self._until: tuple[str, datetime] | None = None

    def again(self) -> None:
        """The log is read anew, from some line before the last one."""
        self._until = (self._last, self.newest) if self.newest else None

    def is_new(self, line: str, when: datetime | None) -> bool:
        """Whether a line of that time comes after what was read. That ends with the last line;
        which may be gone by now, so that a later time is its end as well."""
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


def _time(line: str) -> datetime | None:
    """What the cluster puts before a line, to the microsecond; None before words of its own, such
    as that the log is gone."""
    try:
        when = datetime.fromisoformat(line.partition(" ")[0])
    except ValueError:
        return None
    return when if when.tzinfo else None


def _seconds_ago(when: datetime | None) -> int | None:
    """Rounded up, and never none: the cluster refuses 0."""
    if when is None:
        return None
    return max(1, int((datetime.now(when.tzinfo) - when).total_seconds()) + 1)


def _is_over(cluster: Cluster, name: str) -> bool:
    from torchx.specs import is_terminal

    job = cluster.find(name)
    return job is None or is_terminal(state.app_state(job))
