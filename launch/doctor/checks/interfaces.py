"""A node's network interfaces, and which of them gloo and NCCL use."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import psutil

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interfaces() -> dict[str, list[str]]:
    """Each interface and its addresses, without link-local ones, which need a scope."""
    return {
        name: [
            address.address
            for address in addresses
            if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
        ]
        for name, addresses in psutil.net_if_addrs().items()
    }


def choose(variable: str, wanted: str, there: Mapping[str, list[str]]) -> list[str]:
    """The interfaces that a value of the variable selects.

    gloo takes names, separated by commas. NCCL takes prefixes of names; after "=" complete names;
    after "^" all interfaces but these.
    """
    gloo = variable == "GLOO_SOCKET_IFNAME"
    others = not gloo and wanted.startswith("^")
    exact = gloo or wanted.removeprefix("^").startswith("=")
    names = [name.strip() for name in wanted.lstrip("" if gloo else "^=").split(",")]
    if gloo and not set(names) <= set(there):
        return []  # gloo fails if one of several is missing
    matches = [
        name
        for name in there
        if any(name == one if exact else name.startswith(one) for one in names)
    ]
    return [name for name in there if name not in matches] if others else matches


def addresses_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The addresses that this node's ranks send to the others, each with the reason."""
    there = interfaces()
    found: dict[str, str] = {}
    for variable in VARIABLES:
        if wanted := environ.get(variable):
            for name in choose(variable, wanted, there):
                for address in there[name][:1]:
                    found.setdefault(address, f"{variable}={wanted}")
    if not environ.get("GLOO_SOCKET_IFNAME"):
        found.setdefault(*_of_the_host_name())
    return found


def _of_the_host_name() -> tuple[str, str]:
    """As torch selects it for gloo: the first address of the host's name that belongs to the
    host, else loopback."""
    host = socket.gethostname()
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1", f"its host name {host!r} does not resolve on the node itself"
    for family, kind, protocol, _, address in resolved:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return str(address[0]), f"its host name {host!r} resolves to it on the node itself"
    return "127.0.0.1", f"its host name {host!r} resolves to no address of the node"


def is_loopback(address: str) -> bool:
    """Whether only the host itself can connect to it."""
    return ipaddress.ip_address(address).is_loopback
