"""Starts the process group that all ranks of a run belong to."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from train.distributed.gpu import with_current_gpu
from train.distributed.messages import Messages
from train.distributed.rendezvous import join, open_store
from train.distributed.world import World
from train.exits import RetryError, first_line
from train.signing import Signer

_log = logging.getLogger("train")


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


def end_groups(*, failed: bool, limit: float = 30.0) -> None:
    """Ends all process groups, within ``limit`` seconds. ``failed``: an error ends the run.

    NCCL waits for collectives that are in flight. After an error, other ranks may never call them,
    and the watchdog is closed by then, so they are aborted.
    """
    if not dist.is_initialized():
        return
    on_gpu = _has_nccl()
    if not failed and not on_gpu:
        dist.destroy_process_group()
        return
    end = dist.distributed_c10d._abort_process_group if failed and on_gpu else _destroy
    # A daemon thread: the process can exit while it is blocked.
    thread = threading.Thread(target=with_current_gpu(_logged), args=(end,), daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        _log.warning("the process groups did not end within %g s; not waiting for them", limit)


def _destroy() -> None:
    dist.destroy_process_group()


def _logged(end: Callable[[], None]) -> None:
    """Calls ``end``. The run's result does not depend on whether its groups end without error."""
    try:
        end()
    except Exception as error:
        _log.warning("the process groups did not end: %s", first_line(error))


def _has_nccl() -> bool:
    return "nccl" in str(dist.get_backend_config())


def collectives_called() -> list[int]:
    """How many collectives this rank has called in each of its process groups and backends, ordered
    by the creation of the groups. Ranks with different numbers cannot go on together."""
    found = []
    for group in dist.distributed_c10d._world.pg_names:
        for device in sorted(group._device_types, key=str):
            with suppress(RuntimeError):  # a backend that does not count
                backend: Any = group._get_backend(device)
                found.append(int(backend._get_sequence_number_for_group()))
    return found
