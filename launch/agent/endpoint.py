"""Waits for the place where the nodes meet: its name may not be known yet, nor its port open."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.contract import RetryError

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_GONE = 15.0  # seconds without an answer until a connection counts as lost
_SILENCE = 5.0  # seconds of waiting that are not worth a word


def wait_for_name(host: str, port: int, deadline: float, tell: Callable[[str], None]) -> None:
    """Returns when the name resolves. ``deadline`` in monotonic seconds. Raises RetryError."""
    _retry(
        lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        deadline,
        tell,
        f"the name {host!r} of the rendezvous to be known",
        "see whether it is spelt right, whether node 0 was started, and whether DNS works here",
    )


def wait_for_port(host: str, port: int, deadline: float, tell: Callable[[str], None]) -> None:
    """Returns when something listens there; ``deadline`` as above. Raises RetryError."""

    def connect() -> None:
        left = max(0.1, min(_LONGEST_PAUSE, deadline - time.monotonic()))
        with suppress(ConnectionResetError):
            socket.create_connection((host, port), timeout=left).close()

    _retry(
        connect,
        deadline,
        tell,
        f"node 0 to listen at {host}:{port}",
        "see whether node 0 was started, and whether a firewall or network policy blocks the port",
    )


def notice_silence(port: int) -> None:
    """Makes this process's connections to the port fail when the other side is gone without a
    word, as after a loss of power. torch waits for its store without a limit, and Linux would wait
    for a quarter of an hour."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            if connection.type != socket.SOCK_STREAM or connection.getpeername()[1] != port:
                continue
            for level, option, value in (
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_GONE * 1000)),
                # For one who only listens: asks whether the other side is still there.
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(_GONE / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(_GONE / 3)),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
            ):
                connection.setsockopt(level, option, value)


def _retry(
    attempt: Callable[[], object],
    deadline: float,
    tell: Callable[[str], None],
    what: str,
    advice: str,
) -> None:
    pause, started, told = _FIRST_PAUSE, time.monotonic(), False
    while True:
        try:
            attempt()
        except OSError as error:
            now = time.monotonic()
            if now + pause > deadline:
                raise RetryError(
                    f"Waited {now - started:.0f} s (--rdzv-timeout) for {what}, in vain "
                    f"({error.strerror or error}); {advice}."
                ) from None
            if now - started > _SILENCE and not told:
                tell(f"Waiting for {what} ({error.strerror or error}).")
                told = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return
