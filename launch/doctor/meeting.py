"""How the ranks of a preflight find each other, and how they tell each other what they found.

All goes through the store that torchrun (or rank 0) keeps, in small JSON texts, and nothing waits
without a limit: a rank that does not come, or stops answering, is noted and not waited for again.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from launch.contract import RetryError
from launch.doctor.place import Place

_NAME = "isorun-doctor"
_POLL = 0.02  # seconds


@dataclass(frozen=True)
class Member:
    """What a rank says of itself when it comes."""

    rank: int
    node: int
    host: str
    leads: bool
    token: str
    """Of this very process: the store may still hold what a dead one wrote."""


class Meeting:
    """The ranks that came, and their store."""

    def __init__(self, store: Store, rank: int, members: Iterable[Member]) -> None:
        self.store, self.rank = store, rank
        self.members = {member.rank: member for member in members}
        self.lost: dict[int, str] = {}
        """Ranks that did not answer, and what they were asked for."""

    @property
    def leaders(self) -> list[int]:
        """The ranks that speak for their nodes; the first is rank 0."""
        return sorted(rank for rank, member in self.members.items() if member.leads)

    @property
    def nodes(self) -> list[str]:
        """The labels of all nodes."""
        return [self.label(rank) for rank in self.leaders]

    def label(self, rank: int) -> str:
        """The name of a rank's node: its host's, with a number where several have the same."""
        member = self.members[rank]
        hosts = Counter(self.members[leader].host for leader in self.leaders)
        return member.host if hosts[member.host] < 2 else f"{member.host} (node {member.node})"

    def tell(self, topic: str, value: Any) -> None:
        """Leaves a value for whoever asks this rank for it."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def hear(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What the ranks told; without those who did not within ``seconds``."""
        waiting = [rank for rank in ranks if rank not in self.lost]
        deadline = time.monotonic() + seconds
        told = {}
        for rank in waiting:
            key = f"{topic}/{rank}"
            if _wait(self.store, key, deadline):
                told[rank] = json.loads(self.store.get(key))
            else:
                self.lost[rank] = topic
        return told


def open_store(place: Place, seconds: float) -> Store:
    """The store that all ranks share. Raises RetryError where it does not answer in time."""
    world = place.world
    if world.world_size == 1:
        return HashStore()
    host, port = place.environ["MASTER_ADDR"], int(place.environ["MASTER_PORT"])
    agent_keeps_it = place.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = world.rank == 0 and not agent_keeps_it
    if not is_master:
        seconds = _await_port(host, port, seconds)
    limit = timedelta(seconds=max(1.0, seconds))
    try:
        return TCPStore(host, port, is_master=is_master, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        raise RetryError(
            f"The store of the ranks cannot be {'opened' if is_master else 'reached'} at "
            f"{host}:{port} ({str(error).splitlines()[0]}); see what holds the port, or start it "
            "again with another."
        ) from error


def _await_port(host: str, port: int, seconds: float) -> float:
    """Waits until the port answers; returns the seconds that are left.

    torch could wait, too, but writes a page of C++ frames for each attempt.
    """
    deadline = time.monotonic() + seconds
    pause = 0.05
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, left)).close()
            return left
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise RetryError(
                    f"Rank 0's store does not answer at {host}:{port} (MASTER_ADDR and "
                    f"MASTER_PORT) within {seconds:g} s: {error.strerror or error}; see that "
                    "node 0 has started, that its name resolves and that the port is open."
                ) from None
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def meet(place: Place, store: Store, seconds: float) -> Meeting:
    """Waits for all ranks, but no longer than ``seconds``.

    Rank 0 makes up a name and writes down who greets it under that name; the others greet until
    they find themselves in what it wrote. So nobody takes what an earlier start left in the
    store for now. Raises RetryError where rank 0 does not come.
    """
    world = place.world
    me = Member(world.rank, place.node, world.host, place.leads, uuid.uuid4().hex)
    deadline = time.monotonic() + seconds
    if world.rank == 0:
        name = f"{_NAME}/{uuid.uuid4().hex}"
        store.set(_NAME, name)
        came = [me]
        for rank in range(1, world.world_size):
            if _wait(store, f"{name}/member/{rank}", deadline):
                came.append(Member(**json.loads(store.get(f"{name}/member/{rank}"))))
        store.set(f"{name}/members", json.dumps([asdict(member) for member in came]))
        return Meeting(PrefixStore(name, store), 0, came)
    while True:
        if not _wait(store, _NAME, deadline):
            raise RetryError(
                f"Rank 0 did not come to the preflight within {seconds:g} s; see what became of "
                "it, then start it again."
            )
        name = store.get(_NAME).decode()
        store.set(f"{name}/member/{world.rank}", json.dumps(asdict(me)))
        if _wait(store, f"{name}/members", min(deadline, time.monotonic() + 1.0)):
            members = [Member(**values) for values in json.loads(store.get(f"{name}/members"))]
            if me in members:
                return Meeting(PrefixStore(name, store), world.rank, members)
        if time.monotonic() > deadline + seconds + 5.0:  # rank 0 may have come last, and wait, too
            raise RetryError(
                f"Rank 0 began the preflight without rank {world.rank} on {world.host}, which "
                f"came too late or could not be heard within {seconds:g} s; start it again."
            )


def alone(place: Place) -> Meeting:
    """For rank 0, when nobody can be met: it still examines its own node."""
    me = Member(0, place.node, place.world.host, True, "")
    return Meeting(HashStore(), 0, [me])


def _wait(store: Store, key: str, deadline: float) -> bool:
    """Whether the key came in time. Asks again and again, since a wait inside torch would keep
    both the signals and the other threads of this process waiting."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
