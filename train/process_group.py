"""Starts the process group that all ranks of a run belong to."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from train.world import World

if TYPE_CHECKING:
    from train.config.schema import Config


def timeout_of(config: Config) -> timedelta:
    """How long a rank waits for others: longer than the watchdog, which can say why it waits."""
    limits = (config.watchdog.first_timeout, config.watchdog.timeout)
    return timedelta(seconds=60 + max(1800.0, *(limit or 86400.0 for limit in limits)))


def start_group(world: World, backend: str, timeout: timedelta) -> None:
    """The process group of all ranks.

    Within torchrun, under a name of its own for each restart: with ``--master-addr`` torchrun
    keeps one store through all restarts, and ranks would find the addresses of dead ones in it.
    """
    store: Store | None = None
    if world.world_size == 1:
        store = HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent = TCPStore(address, port, is_master=False, timeout=timeout)
        store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
        )
