"""Waits for the place where the nodes meet: its name may not be known yet, nor its port open."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from train.exits import RetryError

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
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
