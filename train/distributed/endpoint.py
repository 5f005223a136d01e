"""Waits until a host name resolves and a port answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from train.distributed.waiting import Report, reported_wait
from train.exits import RetryError

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0


def wait_for_name(
    host: str,
    port: int,
    deadline: float,
    what: str,
    advice: str,
    report: Report | None = None,
) -> None:
    """Returns when the name resolves.

    ``deadline`` is in monotonic seconds; ``what`` names what is waited for and ``advice`` is a
    sentence, both for the error; ``report`` is called while it takes long. Raises RetryError.
    """
    _retry(
        lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        deadline, what, advice, f"{host} resolves", report,
    )  # fmt: skip


def wait_for_port(
    host: str,
    port: int,
    deadline: float,
    what: str,
    advice: str,
    report: Report | None = None,
) -> None:
    """Returns when something listens on the port; arguments and errors as above."""

    def connect() -> None:
        left = max(0.1, min(_LONGEST_PAUSE, deadline - time.monotonic()))
        with suppress(ConnectionResetError):
            socket.create_connection((host, port), timeout=left).close()

    _retry(connect, deadline, what, advice, f"{host}:{port} answers", report)


def _retry(
    attempt: Callable[[], object],
    deadline: float,
    what: str,
    advice: str,
    over: str,
    report: Report | None,
) -> None:
    pause, started, why = _FIRST_PAUSE, time.monotonic(), "no answer yet"
    with reported_wait(lambda: f"{what} ({why})", report, lambda: over):
        while True:
            try:
                attempt()
            except OSError as error:
                now = time.monotonic()
                why = str(error.strerror or error)
                if now + pause > deadline:
                    raise RetryError(
                        f"Timed out after {now - started:.0f} s waiting for {what}: {why}. {advice}"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return
