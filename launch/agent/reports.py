"""Reports that the agents of a run exchange, through torch's store, on how their ranks ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from launch.agent.failure import RankFailure
from launch.contract import Fields, MessageError, has_fields

if TYPE_CHECKING:
    from launch.contract import Messages

_POLL = 0.05
_HEARTBEAT = 1.0
_ANY = "isorun/any-report"
"""Set once a node has reported a failure, or is lost."""
_KINDS: Fields = {"int": int, "str": str, "float": (int, float), "bool": bool, "list[str]": list}
_FAILURE: Fields = {field.name: _KINDS[str(field.type)] for field in fields(RankFailure)}


@dataclass(frozen=True)
class Report:
    """One node's report on one round, which is the time between two rendezvous."""

    node: int
    failures: list[RankFailure]
    """Empty if all its ranks exited with 0."""
    leaving: bool
    """Whether the node itself was asked to stop, so that it does not rejoin."""

    @classmethod
    def of(cls, values: Any) -> Report:
        """A report from its fields, as ``asdict`` returns them. Raises ValueError for others."""
        match values:
            case {"node": int(node), "failures": [*failures], "leaving": bool(leaving)}:
                return cls(node, [_failure_of(failure) for failure in failures], leaving)
        raise ValueError("not a report")


def _failure_of(values: Any) -> RankFailure:
    if not has_fields(values, _FAILURE) or values.keys() != _FAILURE.keys():
        raise ValueError("not a failure")
    if not all(isinstance(line, str) for line in values["log"]):
        raise ValueError("log has a wrong type")
    return RankFailure(**values)


class Reports:
    """Exchanges the reports of one round. ``messages`` are those of the round's own store.

    The store goes away with the node that keeps it; then there is nothing to read. What nodes of
    this run have not written counts as not there.
    """

    def __init__(self, messages: Messages, node: int, nodes: int) -> None:
        self._messages, self._node, self._nodes = messages, node, nodes
        self._sent = 0.0
        self._others = [other for other in range(nodes) if other != node]
        # Node 0 watches all others. Each node watches the one before it, so that node 0 and a node
        # that is lost together with it are watched, too, without work that grows with the nodes.
        self._watched = self._others if node == 0 else [node - 1]
        self._watched_at = time.monotonic()
        self._heard = dict.fromkeys(self._watched, self._watched_at)
        self._beats: dict[int, int] = {}
        """The last count of heartbeats of each node that has sent one."""
        self._own_beats = 0

    def somebody_failed(self) -> bool:
        """Whether another node has reported a failure, or is lost. Raises RuntimeError if the store
        is gone."""
        return bool(self._others) and self._messages.is_there(_ANY)

    def watch(self, silence: float) -> None:
        """Tells all nodes of those that this node watches, that have not reported, and that sent no
        heartbeat for ``silence`` seconds. Raises RuntimeError if the store is gone."""
        now = time.monotonic()
        if now - self._watched_at > silence / 2:  # this process was paused, so perhaps all were
            self._heard = dict.fromkeys(self._watched, now)
        self._watched_at = now
        for other in self._watched:
            silent = self._silent_since(other) + silence < now
            if silent and not self._messages.is_there(_key(other)):
                self._messages.publish(_lost(other))
                self._messages.publish(_ANY)

    def lost(self) -> list[int]:
        """The other nodes that are lost, as a node that watches them has noticed, and have not
        reported. Raises RuntimeError if the store is gone."""
        return [other for other in self._others if self._is_lost(other)]

    def _is_lost(self, other: int) -> bool:
        is_there = self._messages.is_there
        return is_there(_lost(other)) and not is_there(_key(other))

    def _silent_since(self, other: int) -> float:
        """The monotonic time when its last heartbeat was noticed."""
        key = f"{_key(other)}/beats"
        count = 0
        # The key stays, so later it need not be looked for.
        if other in self._beats or self._messages.store.check([key]):
            with suppress(MessageError):
                count = self._messages.read(key)
        if isinstance(count, int) and count > self._beats.get(other, 0):
            self._beats[other], self._heard[other] = count, time.monotonic()
        return self._heard.setdefault(other, time.monotonic())

    def heartbeat(self) -> None:
        """Shows the others, at most once a second, that this node is alive.

        Raises RuntimeError if the store is gone.
        """
        now = time.monotonic()
        if self._others and now - self._sent > _HEARTBEAT:
            self._sent = now
            self._own_beats += 1
            self._messages.publish(f"{_key(self._node)}/beats", self._own_beats)

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
        noticed to be lost is not waited for.
        """
        found, lost = {own.node: own}, []
        try:
            self._messages.publish(_key(self._node), asdict(own))
            if own.failures:
                self._messages.publish(_ANY)
            heard = dict.fromkeys(self._others, time.monotonic())
            looked = 0.0
            while True:
                self.heartbeat()
                waiting = [other for other in self._others if other not in found]
                for other in waiting:
                    if report := self._report_of(other):
                        found[other] = report
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

    def _report_of(self, other: int) -> Report | None:
        if not self._messages.store.check([_key(other)]):
            return None
        try:
            report = Report.of(self._messages.read(_key(other)))
        except (MessageError, ValueError):
            return None
        return report if report.node == other else None

    def finish(
        self, *, keeps_store: bool, lost: Collection[int], due: Callable[[float], float]
    ) -> None:
        """Notes that this node has read all reports. The node that keeps the store waits for the
        others, which need it to read, but not for ``lost`` ones."""
        try:
            self._messages.publish(f"{_key(self._node)}/read")
            started = time.monotonic()
            waiting = [other for other in self._others if keeps_store and other not in lost]
            while waiting and time.monotonic() < due(started):
                time.sleep(_POLL)
                waiting = [n for n in waiting if not self._messages.is_there(f"{_key(n)}/read")]
        except RuntimeError:
            pass


def _key(node: int) -> str:
    return f"isorun/report/{node}"


def _lost(node: int) -> str:
    return f"{_key(node)}/lost"
