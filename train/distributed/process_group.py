"""Starts the process group that all ranks of a run belong to."""

from __future__ import annotations

import math
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from train.distributed.world import World
from train.exits import RetryError


def start_group(world: World, backend: str, timeout: timedelta) -> None:
    """The process group of all ranks; returns when all have come.

    Raises RetryError where they have not within ``timeout``.
    """
    store: Store | None = None
    if world.world_size == 1:
        store = HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent = TCPStore(address, port, is_master=False, timeout=timeout)
        store = PrefixStore(meet(agent, world.rank, world.world_size, timeout), agent)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
        )


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the ranks which are alive now, and no others, have in common.

    torchrun keeps one store through all restarts and changes of membership, so that ranks would
    find the addresses of dead ones in it. Rank 0 makes up the name; each other rank greets it
    under that name until it is welcomed, which a name left by a dead rank 0 never does.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("isorun", name)
        for other in range(1, world_size):
            _wait(store, f"{name}/from-{other}", deadline)
            store.set(f"{name}/to-{store.get(f'{name}/from-{other}').decode()}", "")
        return name
    me = uuid.uuid4().hex
    while True:
        _wait(store, "isorun", deadline)
        name = store.get("isorun").decode()
        store.set(f"{name}/from-{rank}", me)
        if _wait(store, f"{name}/to-{me}", deadline, patience=2.0):
            return name


def _wait(store: Store, key: str, deadline: float, patience: float = math.inf) -> bool:
    """Whether the key came within ``patience`` seconds."""
    started = time.monotonic()
    while not store.check([key]):
        now = time.monotonic()
        if now > deadline:
            raise RetryError(
                "Not all ranks came to the start of the run in time; see what became of the "
                "others, then start it again."
            )
        if now - started > patience:
            return False
        time.sleep(0.01)
    return True
