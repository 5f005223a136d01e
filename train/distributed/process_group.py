"""Starts the process group that all ranks of a run belong to."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from train.distributed.gpu import with_current_gpu
from train.distributed.messages import Messages, wait_for_key
from train.distributed.rendezvous import join, open_store
from train.distributed.waiting import Report, ranks_of, reported_wait
from train.distributed.world import World
from train.exits import RetryError, first_line
from train.signing import Signer

_log = logging.getLogger("train")
_ended: list[dist.ProcessGroup] = []
"""Groups that have ended, kept until the process ends: torch destroys a gloo group with the
interpreter's lock held, while it waits for the group's threads, and one of these may be waiting for
that lock to release the last collective. That was a deadlock at the end of a run."""


def timeout_of(*watchdog_limits: float | None) -> timedelta:
    """How long a collective waits for other ranks, from the watchdog's limits in seconds, where
    None is no limit: longer than the watchdog, which can report what the rank waits for."""
    return timedelta(seconds=30 + 1.2 * max(limit or 86400.0 for limit in watchdog_limits))


def start_group(
    world: World, backend: str, timeout: timedelta, report: Report | None = None
) -> None:
    """The process group of all ranks; returns when all have joined, on rank 0 when all have
    connected to each other. ``report`` prints a line: it is called while that takes long.

    Raises RetryError if it takes longer than ``timeout``.
    """
    if world.world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if world.on_one_host:
        use_loopback(os.environ)
    seconds = timeout.total_seconds()
    store = store_of_this_start(open_store(world, seconds, report=report), world, timeout, report)
    if world.rank != 0:
        _connect(store, world, backend, timeout)
        return

    @cache
    def beside() -> Store:
        # torch uses its connection to the store without a break while it connects the ranks.
        return cast("Store", cast("Any", store).clone())

    def unconnected() -> list[int]:
        return [r for r in range(world.world_size) if not beside().check([_connected(r)])]

    def describe() -> str:
        ranks = unconnected()
        if not ranks:
            return ""
        return f"{ranks_of(ranks, world.world_size)} to connect to the others ({backend})"

    deadline = time.monotonic() + seconds
    with reported_wait(describe, report, lambda: "All ranks are connected"):
        _connect(store, world, backend, timeout)
        for rank in range(1, world.world_size):
            if not wait_for_key(store, _connected(rank), deadline):
                raise RetryError(
                    f"Timed out after {seconds:g} s waiting for "
                    f"{ranks_of(unconnected(), world.world_size)} to connect to the others. Check "
                    "their logs, and that no firewall blocks ports between the nodes, then rerun."
                )


def _connect(store: Store, world: World, backend: str, timeout: timedelta) -> None:
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
    )
    store.set(_connected(world.rank), "")


def _connected(rank: int) -> str:
    return f"connected/{rank}"


def use_loopback(environ: MutableMapping[str, str]) -> None:
    """Makes gloo use the loopback interface of Linux, unless the environment names another one.
    Otherwise it listens at the address of the host's name, and accepts everyone there."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def store_of_this_start(
    store: Store, world: World, timeout: timedelta, report: Report | None = None
) -> Store:
    """The part of the ranks' store that only those which start now use, all of them.

    Raises RetryError if they have not all joined within ``timeout``.
    """
    seconds = timeout.total_seconds()
    joined = join(Messages(store, Signer.of_environment()), world, seconds, report=report)
    if world.rank == 0 and len(joined.greetings) < world.world_size:
        missing = sorted(set(range(world.world_size)) - joined.greetings.keys())
        raise RetryError(
            f"Timed out after {seconds:g} s waiting for {ranks_of(missing, world.world_size)} to "
            "join. Check their logs, then rerun."
        )
    return PrefixStore(joined.name, store)


def end_groups(*, failed: bool, limit: float = 30.0) -> None:
    """Ends all process groups, within ``limit`` seconds. ``failed``: an error ends the run.

    NCCL waits for collectives that are in flight. After an error, other ranks may never call them,
    and the watchdog is closed by then, so they are aborted.
    """
    if not dist.is_initialized():
        return
    _ended.extend(dist.distributed_c10d._world.pg_map)
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


def end_group(group: dist.ProcessGroup) -> None:
    """Ends one group that :func:`torch.distributed.new_group` has made; collective."""
    _ended.append(group)
    dist.destroy_process_group(group)


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
