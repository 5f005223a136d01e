"""The store of the rendezvous: node 0 starts it, all nodes connect to it."""

from __future__ import annotations

import socket
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from launch.agent.options import AgentOptions
from launch.contract import LOOPBACK, UsageError, address_to_listen_at, open_listening_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters


def open_store(
    options: AgentOptions, parameters: RendezvousParameters, former: TCPStore | None
) -> TCPStore:
    """Starts the store or connects to it. ``former`` is a store at the same address that this
    process has, and perhaps keeps, already.

    Raises OSError or RuntimeError if the store cannot be started or reached, ValueError for wrong
    values in ``--rdzv-conf``, and UsageError for a store of another kind.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

    if (kind := parameters.get("store_type", "tcp")) != "tcp":
        raise UsageError(f"--rdzv-conf has store_type={kind}, but the agent only supports tcp.")
    if former is not None:
        return former  # its keys have the name of another rendezvous
    timeout = timedelta(seconds=max(1, parameters.get_as_int("read_timeout", 60) or 0))
    host, port = options.host, options.port
    given = parameters.get_as_bool("is_host")
    if given or (given is None and _matches_machine_hostname(host)):
        address = listening_address(options)
        try:
            return open_listening_store(address, port, host, timeout)
        except (OSError, RuntimeError):
            if given:
                raise
            # Another agent on this machine is the host.
    return TCPStore(host, port, is_master=False, timeout=timeout)


def open_store_of_ranks(address: str, _: int) -> TCPStore:
    """The store at MASTER_ADDR, which is the address of this node, at a free port; called by
    torch."""
    return open_listening_store(address_to_listen_at(address), 0, address, timedelta(minutes=5))


def listening_address(options: AgentOptions) -> str:
    """Where node 0 listens; empty for all addresses.

    Loopback for one node. For several, the address of the endpoint, to which the others connect,
    if it is numeric, or if ``--local-addr`` shows which of this host's addresses its name means.
    """
    if options.max_nodes == 1:
        return LOOPBACK
    if found := address_to_listen_at(options.host):
        return found
    local = address_to_listen_at(options.local_addr or "")
    with suppress(OSError):
        if local and local in {str(info[4][0]) for info in socket.getaddrinfo(options.host, None)}:
            return local
    return ""
