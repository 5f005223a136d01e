"""The port at which the nodes of a run meet on node 0 (the rendezvous port)."""

from __future__ import annotations

import socket
import zlib

DEFAULT_PORT = 29500
"""Where neither the launcher nor the user chooses one; torchrun has the same default."""

# Below the ephemeral ports that operating systems hand out.
_LOWEST_SHARED, _SHARED_PORTS = 10000, 20000


def free_port() -> int:
    """A port of this machine that is free now. The kernel assigns other ports for a while before
    it assigns this one again."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def port_of_run(run_id: str) -> int:
    """A port that all nodes compute alike from the run's id, for machines that jobs share; two
    runs rarely get the same."""
    return _LOWEST_SHARED + zlib.crc32(run_id.encode()) % _SHARED_PORTS
