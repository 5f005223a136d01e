"""Starts the process group that all ranks of a run belong to."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from train.distributed.messages import Messages
from train.distributed.rendezvous import join, open_store
from train.distributed.world import World
from train.exits import RetryError
from train.signing import Signer


def timeout_of(*watchdog_limits: float | None) -> timedelta:
    """How long a collective waits for other ranks, from the watchdog's limits in seconds, where
    None is no limit: longer than the watchdog, which can report what the rank waits for."""
    return timedelta(seconds=30 + 1.2 * max(limit or 86400.0 for limit in watchdog_limits))


def start_group(world: World, backend: str, timeout: timedelta) -> None:
    """The process group of all ranks; returns when all have joined.

    Raises RetryError if they have not within ``timeout``.
    """
    store: Store = HashStore()
    if world.world_size > 1:
        if world.on_one_host:
            use_loopback(os.environ)
        store = store_of_this_start(open_store(world, timeout.total_seconds()), world, timeout)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
    )


def use_loopback(environ: MutableMapping[str, str]) -> None:
    """Makes gloo use the loopback interface of Linux, unless the environment names another one.
    Otherwise it listens at the address of the host's name, and accepts everyone there."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def store_of_this_start(store: Store, world: World, timeout: timedelta) -> Store:
    """The part of the ranks' store that only those which start now use, all of them.

    Raises RetryError if they have not all joined within ``timeout``.
    """
    seconds = timeout.total_seconds()
    joined = join(Messages(store, Signer.of_environment()), world, seconds)
    if world.rank == 0 and len(joined.greetings) < world.world_size:
        missing = sorted(set(range(world.world_size)) - joined.greetings.keys())
        raise RetryError(
            f"Timed out after {seconds:g} s waiting for ranks to join: "
            f"{', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''} of "
            f"{world.world_size} did not. Check their logs, then rerun."
        )
    return PrefixStore(joined.name, store)
