"""The signals that request a stop, and their handling before a run handles them itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.exits import Exit
from train.process.emergency_output import write_stderr

TERMINATING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The sender kills the process some seconds later, or its terminal is gone."""

STOP_SIGNALS = (*TERMINATING, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""All requests to stop: SIGUSR1 and SIGUSR2 announce a time limit, SIGXCPU a limit of CPU time."""

# Handled even if they are ignored: a shell that ignores one for itself passes that on.
_NEVER_IGNORED = (signal.SIGTERM, signal.SIGINT)


def handled_signals() -> tuple[signal.Signals, ...]:
    """The stop signals that this process handles. Those that were ignored when it started, such as
    SIGHUP by ``nohup``, stay ignored, except SIGTERM and SIGINT."""
    return tuple(
        number
        for number in STOP_SIGNALS
        if number in _NEVER_IGNORED or signal.getsignal(number) != signal.SIG_IGN
    )


def unblock_stop_signals() -> None:
    """Delivers stop signals even if the process that started this one has blocked them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile get no stop signal before they unblock them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_at_stop_signals() -> None:
    """From now on, until a run handles them, stop signals end the process with 143 and a line.
    SIGINT keeps its handler, which raises KeyboardInterrupt."""
    for number in handled_signals():
        if number != signal.SIGINT:
            signal.signal(number, _end)
    os.register_at_fork(after_in_child=_restore_defaults)
    unblock_stop_signals()


def _restore_defaults() -> None:
    """In a forked child, such as one of a pool that the user's code terminates."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    write_stderr(f"stopped on request ({signal.Signals(number).name}) before a run was open.")
    os._exit(Exit.PREEMPTED)
