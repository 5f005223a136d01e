"""What the agents of a run tell each other about how their ranks ended, through torch's store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launch.agent.failure import Failure

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL = 0.05
_BEAT = 1.0
_ANY = "isorun/any-report"


@dataclass(frozen=True)
class Report:
    """One node's word on one round: a round is what lies between two meetings of the nodes."""

    node: int
    failures: list[Failure]
    """Empty if all its ranks ended well."""
    leaving: bool
    """Whether the node itself was asked to stop, and will not come back."""

    def encode(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Report:
        """From text."""
        values: dict[str, Any] = json.loads(text)
        values["failures"] = [Failure(**failure) for failure in values["failures"]]
        return cls(**values)


class Reports:
    """The reports of one round. ``store`` is that round's own.

    A store that is gone went with its node; what would be read from it is then not there.
    """

    def __init__(self, store: Store, node: int, nodes: int) -> None:
        self._store, self._node, self._nodes = store, node, nodes
        self._beaten = 0.0
        self._others = [other for other in range(nodes) if other != node]

    def somebody_failed(self) -> bool:
        """Whether another node has reported a failure. Raises RuntimeError if the store is gone."""
        return bool(self._others) and self._store.check([_ANY])

    def beat(self) -> None:
        """A sign of life, every second or so. Raises RuntimeError if the store is gone."""
        now = time.monotonic()
        if self._others and now - self._beaten > _BEAT:
            self._beaten = now
            self._store.add(f"{_key(self._node)}/beats", 1)

    def exchange(
        self,
        own: Report,
        is_enough: Callable[[list[Report]], bool],
        patience: float,
        *,
        while_alive: bool = False,
    ) -> tuple[list[Report], list[int]]:
        """Publishes this node's report. Returns the reports that are there as soon as they are
        enough or all, and the nodes that were waited for in vain: for ``patience`` seconds, which
        ``while_alive`` counts from their last sign of life."""
        found, lost = {own.node: own}, []
        try:
            self._store.set(_key(self._node), own.encode())
            if own.failures:
                self._store.set(_ANY, "")
            heard = dict.fromkeys(self._others, time.monotonic())
            beats: dict[int, int] = {}
            looked = 0.0
            while True:
                self.beat()
                waiting = [other for other in self._others if other not in found]
                for other in waiting:
                    if self._store.check([_key(other)]):
                        found[other] = Report.decode(self._store.get(_key(other)))
                now = time.monotonic()
                if while_alive and now - looked > _BEAT:
                    looked = now
                    for other in waiting:
                        count = self._store.add(f"{_key(other)}/beats", 0)
                        if count != beats.get(other):
                            beats[other], heard[other] = count, now
                if len(found) == self._nodes or is_enough(list(found.values())):
                    break
                waiting = [other for other in self._others if other not in found]
                if all(now - heard[other] > patience for other in waiting):
                    lost = waiting
                    break
                time.sleep(_POLL)
        except RuntimeError:
            lost = [0] if self._node else []
        return [found[node] for node in sorted(found)], lost

    def part(self, *, keeps_store: bool, lost: Collection[int], patience: float) -> None:
        """Says that this node has read what it needs. The one that keeps the store waits for the
        others, which could not read it afterwards, but not for those that are ``lost``."""
        try:
            self._store.set(f"{_key(self._node)}/read", "")
            deadline = time.monotonic() + patience
            waiting = [other for other in self._others if keeps_store and other not in lost]
            while waiting and time.monotonic() < deadline:
                time.sleep(_POLL)
                waiting = [n for n in waiting if not self._store.check([f"{_key(n)}/read"])]
        except RuntimeError:
            pass


def _key(node: int) -> str:
    return f"isorun/report/{node}"
