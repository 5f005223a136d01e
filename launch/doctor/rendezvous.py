"""How the ranks of a preflight find each other and exchange results.

Results are short JSON texts in the store of torchrun, the agent or rank 0. Every wait has a limit,
and a rank that missed one is recorded and not waited for again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from launch.contract import RetryError, join_ranks, log, wait_for_key
from launch.doctor.place import Place

_MEMBERS = "members"


@dataclass(frozen=True)
class Member:
    """A rank that joined."""

    rank: int
    node: int
    host: str
    leads: bool
    """Whether it runs the checks of its node."""


class Rendezvous:
    """The ranks that joined, and the store that only they use."""

    def __init__(self, store: Store, rank: int, members: Iterable[Member]) -> None:
        self.store, self.rank = store, rank
        self.members = {member.rank: member for member in members}
        self.lost: dict[int, str] = {}
        """Ranks that did not answer, and the topic that they were asked for."""

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node; the first of them is rank 0."""
        return sorted(rank for rank, member in self.members.items() if member.leads)

    @property
    def nodes(self) -> list[str]:
        """The labels of all nodes."""
        return [self.label(rank) for rank in self.leaders]

    def label(self, rank: int) -> str:
        """The host of a rank's node, with the node's number if several have that host."""
        member = self.members[rank]
        hosts = Counter(self.members[leader].host for leader in self.leaders)
        return member.host if hosts[member.host] < 2 else f"{member.host} (node {member.node})"

    def publish(self, topic: str, value: Any) -> None:
        """Stores this rank's value for a topic."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def collect(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The values that these ranks publish within ``seconds``."""
        waiting = [rank for rank in ranks if rank not in self.lost]
        deadline = time.monotonic() + seconds
        values = {}
        for rank in waiting:
            key = f"{topic}/{rank}"
            if wait_for_key(self.store, key, deadline):
                values[rank] = json.loads(self.store.get(key))
            else:
                self.lost[rank] = topic
        return values


def join(place: Place, store: Store, seconds: float) -> Rendezvous:
    """Waits ``seconds`` for all ranks; those that do not join by then are left out.

    Raises RetryError on a rank that rank 0 has not admitted.
    """
    world = place.world
    me = Member(world.rank, place.node, world.host, place.leads)
    # Rank 0 may have started last, and then waits for others as long itself.
    grace = seconds + 5.0
    greeting = json.dumps(asdict(me))
    joined = join_ranks(
        store, world, seconds, topic="isorun-doctor", greeting=greeting, grace=grace, report=log
    )
    own = PrefixStore(joined.name, store)
    if world.rank == 0:
        members = [Member(**json.loads(text)) for text in joined.greetings.values()]
        own.set(_MEMBERS, json.dumps([asdict(member) for member in members]))
        return Rendezvous(own, 0, members)
    if not wait_for_key(own, _MEMBERS, time.monotonic() + grace):
        raise RetryError(
            f"Timed out after {grace:g} s waiting for rank 0 to start the preflight. Check rank "
            "0's log, then rerun."
        )
    members = [Member(**values) for values in json.loads(own.get(_MEMBERS))]
    return Rendezvous(own, world.rank, members)


def alone(place: Place) -> Rendezvous:
    """For rank 0 if the store cannot be opened: it still checks its own node."""
    me = Member(0, place.node, place.world.host, True)
    return Rendezvous(HashStore(), 0, [me])
