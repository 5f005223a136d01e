"""How ranks find each other through a store that may outlive them.

torchrun and the node agent keep one store through all restarts and changes of membership, so that
it still holds what ranks of earlier starts have written. Ranks that start together therefore agree
on a new name, under which nothing is stored yet.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, Store, TCPStore

from train.distributed.endpoint import wait_for_port
from train.distributed.world import World
from train.exits import RetryError

_POLL = 0.02  # seconds
_ADMISSION = 2.0  # seconds until a rank looks for a newer name


@dataclass(frozen=True)
class Members:
    """The ranks that started together."""

    name: str
    """A prefix for keys of the store that no other start uses."""
    greetings: dict[int, str]
    """On rank 0: what each rank that joined has sent along. Empty on other ranks."""


def agent_keeps_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the store at MASTER_ADDR belongs to torchrun or the node agent, not to rank 0."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(world: World, seconds: float, environ: Mapping[str, str] = os.environ) -> Store:
    """The store that all ranks share. Raises RetryError if it does not answer in time."""
    if world.world_size == 1:
        return HashStore()
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    is_master = world.rank == 0 and not agent_keeps_store(environ)
    deadline = time.monotonic() + seconds
    if not is_master:
        # torch waits as well, but writes a page of C++ frames for each attempt.
        wait_for_port(
            host, port, deadline, f"the store at {host}:{port} (MASTER_ADDR and MASTER_PORT)",
            "Check that node 0 has started, that its name resolves and that the port is open.",
        )  # fmt: skip
    limit = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return TCPStore(host, port, is_master=is_master, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        raise RetryError(
            f"Cannot {'open' if is_master else 'reach'} the store of the ranks at {host}:{port} "
            f"({str(error).splitlines()[0]}). Check which process uses the port, then rerun, if "
            "necessary with another port."
        ) from error


def join(
    store: Store,
    world: World,
    seconds: float,
    *,
    topic: str = "isorun",
    greeting: str = "",
    grace: float = 0.0,
) -> Members:
    """Joins the ranks that start now, and returns when rank 0 has admitted this rank.

    Rank 0 stores a new name, waits up to ``seconds`` for a greeting of each other rank under that
    name, and admits each by the random token in its greeting. Other ranks greet until they are
    admitted, which never happens under the name of a rank 0 that is gone. They wait ``seconds``
    for a name, and ``grace`` longer for the admission: rank 0 may have started last, and it
    admits in the order of ranks.

    On rank 0 ``greetings`` lacks the ranks that did not join in time. Raises RetryError on any
    other rank that is not admitted.
    """
    if world.rank == 0:
        return _admit(store, world.world_size, seconds, topic, greeting)
    token = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    while wait_for_key(store, topic, deadline):
        name = store.get(topic).decode()
        store.set(f"{name}/from-{world.rank}", json.dumps([token, greeting]))
        last = deadline + grace
        if wait_for_key(store, f"{name}/to-{token}", min(time.monotonic() + _ADMISSION, last)):
            return Members(name, {})
        if time.monotonic() > last:
            raise RetryError(
                f"Timed out after {seconds + grace:g} s waiting for rank 0 to admit rank "
                f"{world.rank} on {world.host}: rank 0 failed, or started without this rank. Check "
                "rank 0's log, then rerun."
            )
    raise RetryError(
        f"Timed out after {seconds:g} s waiting for rank 0 to join. Check rank 0's log, then rerun."
    )


def _admit(store: Store, world_size: int, seconds: float, topic: str, greeting: str) -> Members:
    """Rank 0's side."""
    deadline = time.monotonic() + seconds
    name = f"{topic}/{uuid.uuid4().hex}"
    store.set(topic, name)
    greetings = {0: greeting}
    for rank in range(1, world_size):
        key = f"{name}/from-{rank}"
        if wait_for_key(store, key, deadline):
            token, greetings[rank] = json.loads(store.get(key))
            store.set(f"{name}/to-{token}", "")
    return Members(name, greetings)


def wait_for_key(store: Store, key: str, deadline: float) -> bool:
    """Whether the key is set by ``deadline``, in monotonic seconds. Polls, because a wait inside
    torch blocks the signals and the other threads of this process."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
