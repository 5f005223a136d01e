"""The address at which a store of torch listens: no wider than its users need.

torch itself listens on all addresses of the host.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"
_BACKLOG = 4096  # as torch: all ranks connect at once


def address_to_listen_at(host: str) -> str:
    """The address of this host that others connect to by ``host``: ``host`` itself where it is a
    numeric address of this host, else empty, which means all addresses. A name may mean other
    addresses to other hosts."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return host if is_of_this_host(host) else ""
    return ""


def is_of_this_host(address: str) -> bool:
    """Whether a numeric address belongs to an interface of this host."""
    try:
        listen(address, 0).close()
    except OSError:
        return False
    return True


def open_listening_store(address: str, port: int, host: str, timeout: timedelta) -> TCPStore:
    """Starts a store that listens at the address, or at all addresses if it is empty, and connects
    to it: then by ``host``. ``port`` 0 is any free port.

    Raises OSError or RuntimeError if the port is taken.
    """
    listener = listen(address, port)
    port = listener.getsockname()[1]
    try:
        return TCPStore(
            address or host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            # With it, torch takes a server of this process at the same port of another address.
            multi_tenant=False,
            master_listen_fd=listener.fileno(),
        )
    finally:
        listener.detach()  # the store closes it


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at the address, or at all addresses of the host if it is empty; port 0
    is any free one. Raises OSError."""
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=_BACKLOG)
