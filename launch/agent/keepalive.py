"""Detects that the other side of a connection is gone without closing it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

_SECONDS = 15.0  # without an answer until a connection counts as lost


def set_keepalive(port: int) -> None:
    """Makes this process's connections to the port fail when the other side stops answering, as
    after a power failure. torch waits for its store without a limit, and Linux waits 15 minutes.

    Does nothing on systems other than Linux.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT") or not Path("/proc/self/fd").is_dir():
        return
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
            if not is_tcp or connection.type != socket.SOCK_STREAM:
                continue
            if connection.getpeername()[1] != port:
                continue
            for level, option, value in (
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SECONDS * 1000)),
                # For a side that only receives: probes whether the other one still answers.
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(_SECONDS / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(_SECONDS / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
            ):
                connection.setsockopt(level, option, value)
