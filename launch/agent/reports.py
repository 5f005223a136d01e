"""Reports that the agents of a run exchange, through torch's store, on how their ranks ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from launch.agent.failure import RankFailure
from launch.contract import UsageError
from launch.fields import Fields, has_fields

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL = 0.05
_HEARTBEAT = 1.0
_ANY = "isorun/any-report"
"""Set once a node has reported a failure, or is lost."""
_REPORT: Fields = {"node": int, "failures": list, "leaving": bool}
_FAILURE: Fields = {
    "rank": int, "local_rank": int, "host": str, "pid": int, "exit_code": int, "error": str,
    "time": (int, float), "log": list,
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One node's report on one round, which is the time between two rendezvous."""

    node: int
    failures: list[RankFailure]
    """Empty if all its ranks exited with 0."""
    leaving: bool
    """Whether the node itself was asked to stop, so that it does not rejoin."""

    def encode(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes, node: int) -> Report:
        """The report of a node, from JSON. Fields that this version does not know are left out.
        Raises UsageError if it lacks one that this version needs."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if (
            not has_fields(values, _REPORT)
            or values["node"] != node
            or not all(has_fields(failure, _FAILURE) for failure in values["failures"])
        ):
            raise UsageError(
                f"The report of node {node} on how its ranks ended cannot be read, so that node "
                "runs another version of isorun; start all nodes with the same version, and see "
                "that node's log for the failure."
            )
        known = [field.name for field in fields(RankFailure)]
        failures = [
            RankFailure(**{name: failure[name] for name in known if name in failure})
            for failure in values["failures"]
        ]
        return cls(node, failures, values["leaving"])


class Reports:
    """Exchanges the reports of one round. ``store`` is that round's own.

    The store goes away with the node that keeps it; then there is nothing to read.
    """

    def __init__(self, store: Store, node: int, nodes: int) -> None:
        self._store, self._node, self._nodes = store, node, nodes
        self._sent = 0.0
        self._others = [other for other in range(nodes) if other != node]
        # Node 0 watches all others. Each node watches the one before it, so that node 0 and a node
        # that is lost together with it are watched, too, without work that grows with the nodes.
        self._watched = self._others if node == 0 else [node - 1]
        self._watched_at = time.monotonic()
        self._heard = dict.fromkeys(self._watched, self._watched_at)
        self._beats: dict[int, int] = {}

    def somebody_failed(self) -> bool:
        """Whether another node has reported a failure, or is lost. Raises RuntimeError if the store
        is gone."""
        return bool(self._others) and self._store.check([_ANY])

    def watch(self, silence: float) -> None:
        """Tells all nodes of those that this node watches, that have not reported, and that sent no
        heartbeat for ``silence`` seconds. Raises RuntimeError if the store is gone."""
        now = time.monotonic()
        if now - self._watched_at > silence / 2:  # this process was paused, so perhaps all were
            self._heard = dict.fromkeys(self._watched, now)
        self._watched_at = now
        for other in self._watched:
            silent = self._silent_since(other) + silence < now
            if silent and not self._store.check([_key(other)]):
                self._store.set(_lost(other), "")
                self._store.set(_ANY, "")

    def lost(self) -> list[int]:
        """The other nodes that are lost, as a node that watches them has noticed, and have not
        reported. Raises RuntimeError if the store is gone."""
        return [other for other in self._others if self._is_lost(other)]

    def _is_lost(self, other: int) -> bool:
        store = self._store
        return store.check([_lost(other)]) and not store.check([_key(other)])

    def _silent_since(self, other: int) -> float:
        """The monotonic time when its last heartbeat was noticed."""
        count = self._store.add(f"{_key(other)}/beats", 0)
        if count != self._beats.get(other) or other not in self._heard:
            self._beats[other], self._heard[other] = count, time.monotonic()
        return self._heard[other]

    def heartbeat(self) -> None:
        """Shows the others, at most once a second, that this node is alive.

        Raises RuntimeError if the store is gone.
        """
        now = time.monotonic()
        if self._others and now - self._sent > _HEARTBEAT:
            self._sent = now
            self._store.add(f"{_key(self._node)}/beats", 1)

    def exchange(
        self,
        own: Report,
        is_enough: Callable[[list[Report]], bool],
        due: Callable[[float], float],
        *,
        while_alive: bool = False,
    ) -> tuple[list[Report], list[int]]:
        """Stores this node's report and waits for the others.

        Returns the reports as soon as they are all there or ``is_enough`` of them, and the nodes
        that are lost. ``due`` gives the time when a node is lost that is silent since another time:
        since this call, or with ``while_alive`` since its last heartbeat. A node that others have
        noticed to be lost is not waited for. Raises UsageError for the report of another version.
        """
        found, lost = {own.node: own}, []
        try:
            self._store.set(_key(self._node), own.encode())
            if own.failures:
                self._store.set(_ANY, "")
            heard = dict.fromkeys(self._others, time.monotonic())
            looked = 0.0
            while True:
                self.heartbeat()
                waiting = [other for other in self._others if other not in found]
                for other in waiting:
                    if self._store.check([_key(other)]):
                        found[other] = Report.decode(self._store.get(_key(other)), other)
                now = time.monotonic()
                if while_alive and now - looked > _HEARTBEAT:
                    looked = now
                    heard |= {other: self._silent_since(other) for other in waiting}
                if len(found) == self._nodes or is_enough(list(found.values())):
                    break
                waiting = [other for other in self._others if other not in found]
                if all(now > due(heard[other]) or self._is_lost(other) for other in waiting):
                    lost = waiting
                    break
                time.sleep(_POLL)
        except RuntimeError:
            lost = [0] if self._node else []
        return [found[node] for node in sorted(found)], lost

    def finish(
        self, *, keeps_store: bool, lost: Collection[int], due: Callable[[float], float]
    ) -> None:
        """Notes that this node has read all reports. The node that keeps the store waits for the
        others, which need it to read, but not for ``lost`` ones."""
        try:
            self._store.set(f"{_key(self._node)}/read", "")
            started = time.monotonic()
            waiting = [other for other in self._others if keeps_store and other not in lost]
            while waiting and time.monotonic() < due(started):
                time.sleep(_POLL)
                waiting = [n for n in waiting if not self._store.check([f"{_key(n)}/read"])]
        except RuntimeError:
            pass


def _key(node: int) -> str:
    return f"isorun/report/{node}"


def _lost(node: int) -> str:
    return f"{_key(node)}/lost"
