"""How the ranks of a preflight find each other and exchange results.

Results are short signed messages in the store of torchrun, the agent or rank 0. Every wait has a
limit, and a rank that missed one is recorded and not waited for again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from launch.contract import Messages, RetryError, Signer, join_ranks, unreadable
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

    def __init__(self, messages: Messages, rank: int, members: Iterable[Member]) -> None:
        self._messages, self.rank = messages, rank
        self.members = {member.rank: member for member in members}
        self.lost: dict[int, str] = {}
        """Ranks that did not answer, and the topic that they were asked for."""

    @property
    def store(self) -> Store:
        """The store, for a process group."""
        return self._messages.store

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
        self._messages.publish(f"{topic}/{self.rank}", value)

    def collect(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The values that these ranks publish within ``seconds``."""
        waiting = [rank for rank in ranks if rank not in self.lost]
        deadline = time.monotonic() + seconds
        values = {}
        for rank in waiting:
            key = f"{topic}/{rank}"
            if self._messages.wait_for(key, deadline):
                values[rank] = self._messages.read(key)
            else:
                self.lost[rank] = topic
        return values


def join(place: Place, store: Store, seconds: float) -> Rendezvous:
    """Waits ``seconds`` for all ranks; those that do not join by then are left out.

    Raises RetryError on a rank that rank 0 has not admitted, and on messages of another process.
    """
    world = place.world
    signer = Signer.of_environment(place.environ)
    me = Member(world.rank, place.node, world.host, place.leads)
    # Rank 0 may have started last, and then waits for others as long itself.
    grace = seconds + 5.0
    topic = "isorun-doctor"
    joined = join_ranks(
        Messages(store, signer), world, seconds,
        topic=topic, greeting=asdict(me), grace=grace,
    )  # fmt: skip
    own = Messages(PrefixStore(joined.name, store), signer, joined.name)
    if world.rank == 0:
        members = [_member(topic, greeting) for greeting in joined.greetings.values()]
        own.publish(_MEMBERS, [asdict(member) for member in members])
        return Rendezvous(own, 0, members)
    if not own.wait_for(_MEMBERS, time.monotonic() + grace):
        raise RetryError(
            f"Timed out after {grace:g} s waiting for rank 0 to start the preflight. Check rank "
            "0's log, then rerun."
        )
    listed = own.read(_MEMBERS)
    if not isinstance(listed, list):
        raise unreadable(_MEMBERS)
    members = [_member(_MEMBERS, values) for values in listed]
    return Rendezvous(own, world.rank, members)


def _member(key: str, values: Any) -> Member:
    match values:
        case {"rank": int(rank), "node": int(node), "host": str(host), "leads": bool(leads)}:
            return Member(rank, node, host, leads)
    raise unreadable(key)


def alone(place: Place) -> Rendezvous:
    """For rank 0 if the store cannot be opened: it still checks its own node."""
    me = Member(0, place.node, place.world.host, True)
    return Rendezvous(Messages(HashStore(), Signer()), 0, [me])
