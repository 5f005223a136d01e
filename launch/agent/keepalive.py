"""Detects that the other side of a connection is gone without closing it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SECONDS = 15.0  # without an acknowledgement until a connection counts as lost
_ANSWER = 10  # seconds until a process that does not read, as when it is paused, counts as lost


def set_keepalive(port: int) -> None:
    """Makes this process's connections to the port fail when the other side stops answering, as
    after a power failure, or when its process is paused. torch waits for its store without a limit,
    and Linux waits 15 minutes.

    Does nothing on systems other than Linux.
    """
    for connection in _connections(port):
        with suppress(OSError):  # closed meanwhile
            for level, option, value in (
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SECONDS * 1000)),
                # For a side that only receives: probes whether the other one still answers.
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(_SECONDS / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(_SECONDS / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
            ):
                connection.setsockopt(level, option, value)
            # Answers only: torch waits for keys with a time limit of its own, by poll.
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _ANSWER, 0)
            )


def end_connections(port: int) -> None:
    """Ends this process's connections to the port, so that each later use fails at once instead of
    waiting for an answer again."""
    for connection in _connections(port):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _connections(port: int) -> Iterator[socket.socket]:
    """This process's connections to the port of another process or of this one; each is a copy,
    closed after its use. None on systems other than Linux."""
    if not hasattr(socket, "TCP_USER_TIMEOUT") or not Path("/proc/self/fd").is_dir():
        return
    for path in sorted(Path("/proc/self/fd").iterdir()):
        try:
            descriptor = os.dup(int(path.name))
        except OSError:  # the one of this listing
            continue
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:  # no socket
            os.close(descriptor)
            continue
        with connection:
            if _is_connection(connection, port):
                yield connection


def _is_connection(found: socket.socket, port: int) -> bool:
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        return False
    with suppress(OSError):  # not connected
        return bool(found.getpeername()[1] == port)
    return False
