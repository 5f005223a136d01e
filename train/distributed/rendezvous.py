"""How ranks find each other through a store that may outlive them.

torchrun and the node agent keep one store through all restarts and changes of membership, so that
it still holds what ranks of earlier starts have written. Ranks that start together therefore agree
on a new name, under which nothing is stored yet. Their messages are signed, so that ranks of one
run admit each other only.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import HashStore, Store, TCPStore

from train.distributed.endpoint import wait_for_port
from train.distributed.listening import LOOPBACK, address_to_listen_at, open_listening_store
from train.distributed.messages import Messages, unreadable
from train.distributed.world import World
from train.exits import RetryError, first_line

_ADMISSION = 2.0  # seconds until a rank looks for a newer name


@dataclass(frozen=True)
class Members:
    """The ranks that started together."""

    name: str
    """A prefix for keys of the store that no other start uses."""
    greetings: dict[int, Any]
    """On rank 0: what each rank that joined has sent along. Empty on other ranks."""


def agent_keeps_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the store at MASTER_ADDR belongs to torchrun or the node agent, not to rank 0."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(world: World, seconds: float, environ: Mapping[str, str] = os.environ) -> Store:
    """The store that all ranks share. Where rank 0 keeps it, it listens at the loopback address if
    all ranks are on one host, else at MASTER_ADDR if that is a numeric address.

    Raises RetryError if it does not answer in time.
    """
    if world.world_size == 1:
        return HashStore()
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    by_agent = agent_keeps_store(environ)
    if world.on_one_host and not by_agent:
        host = LOOPBACK
    is_master = world.rank == 0 and not by_agent
    deadline = time.monotonic() + seconds
    if not is_master:
        # torch waits as well, but writes a page of C++ frames for each attempt.
        wait_for_port(
            host, port, deadline, f"the store at {host}:{port} (MASTER_ADDR and MASTER_PORT)",
            "Check that node 0 has started, that its name resolves and that the port is open.",
        )  # fmt: skip
    limit = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        if is_master:
            return open_listening_store(address_to_listen_at(host), port, host, limit)
        return TCPStore(host, port, timeout=limit, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise RetryError(
            f"Cannot {'open' if is_master else 'reach'} the store of the ranks at {host}:{port} "
            f"({first_line(error)}). Check which process uses the port, then rerun, if "
            "necessary with another port."
        ) from error


def join(
    messages: Messages,
    world: World,
    seconds: float,
    *,
    topic: str = "isorun",
    greeting: Any = None,
    grace: float = 0.0,
) -> Members:
    """Joins the ranks that start now, and returns when rank 0 has admitted this rank.

    Rank 0 stores a new name, waits up to ``seconds`` for a greeting of each other rank under that
    name, and admits each by the random token in its greeting. Other ranks greet until they are
    admitted, which never happens under the name of a rank 0 that is gone. They wait ``seconds``
    for a name, and ``grace`` longer for the admission: rank 0 may have started last, and it
    admits in the order of ranks.

    On rank 0 ``greetings`` lacks the ranks that did not join in time. Raises RetryError on any
    other rank that is not admitted, and where another process has written a message.
    """
    if world.rank == 0:
        return _admit(messages, world.world_size, seconds, topic, greeting)
    token = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    while messages.wait_for(topic, deadline):
        name = messages.read(topic)
        if not isinstance(name, str):
            raise unreadable(topic)
        messages.publish(f"{name}/from-{world.rank}", [token, greeting])
        last = min(time.monotonic() + _ADMISSION, deadline + grace)
        admitted = f"{name}/to-{token}"
        if messages.wait_for(admitted, last):
            messages.read(admitted)
            return Members(name, {})
        if time.monotonic() > deadline + grace:
            raise RetryError(
                f"Timed out after {seconds + grace:g} s waiting for rank 0 to admit rank "
                f"{world.rank} on {world.host}: rank 0 failed, or started without this rank. Check "
                "rank 0's log, then rerun."
            )
    raise RetryError(
        f"Timed out after {seconds:g} s waiting for rank 0 to join. Check rank 0's log, then rerun."
    )


def _admit(
    messages: Messages, world_size: int, seconds: float, topic: str, greeting: Any
) -> Members:
    """Rank 0's side."""
    deadline = time.monotonic() + seconds
    name = f"{topic}/{uuid.uuid4().hex}"
    messages.publish(topic, name)
    greetings = {0: greeting}
    for rank in range(1, world_size):
        key = f"{name}/from-{rank}"
        if messages.wait_for(key, deadline):
            token, greetings[rank] = _greeting(key, messages.read(key))
            messages.publish(f"{name}/to-{token}")
    return Members(name, greetings)


def _greeting(key: str, value: Any) -> tuple[str, Any]:
    match value:
        case [str(token), greeting]:
            return token, greeting
    raise unreadable(key)
