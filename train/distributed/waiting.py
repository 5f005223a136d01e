"""Reports a wait for other processes while it lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

Report = Callable[[str], None]
"""Prints a line for people."""

FIRST_REPORT = 5.0
"""Seconds of waiting until the first line; the next ones follow after twice the time."""


@contextmanager
def reported_wait(
    describe: Callable[[], str], report: Report | None, over: Callable[[], str]
) -> Iterator[None]:
    """Surrounds a wait, which may block this thread: another one reports it after 5, 10, 20 ...
    seconds.

    ``describe`` is called in the other thread and names what is waited for; nothing is reported
    while that is empty. ``over`` is reported when a wait that was reported ends without an error.
    """
    if report is None:
        yield
        return
    started, ended = time.monotonic(), threading.Event()
    lines = 0

    def watch() -> None:
        nonlocal lines
        due = FIRST_REPORT
        while not ended.wait(started + due - time.monotonic()):
            what = ""
            with suppress(RuntimeError):  # of a store that is gone; the wait ends for it as well
                what = describe()
            if what and not ended.is_set():
                report(f"Waiting for {what}; {due:g} s so far.")
                lines += 1
            due *= 2

    watching = threading.Thread(target=watch, name="reported-wait", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join(1.0)  # it may wait for a store that does not answer
    if lines and (text := over()):
        report(f"{text} after {time.monotonic() - started:.0f} s.")


def ranks_of(ranks: Sequence[int], world_size: int) -> str:
    """``rank 3 of 4``, ``ranks 1, 2 of 4``; the first eight of them."""
    listed = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed} of {world_size}"
