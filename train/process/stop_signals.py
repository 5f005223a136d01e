"""The signals that request a stop, and their handling before a run handles them itself."""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from train.exits import Exit
from train.process.abrupt_end import within
from train.process.cleanup import clean_up
from train.process.emergency_output import write_stderr

TERMINATING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The sender kills the process some seconds later, or its terminal is gone."""

STOP_SIGNALS = (*TERMINATING, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""All requests to stop: SIGUSR1 and SIGUSR2 announce a time limit, SIGXCPU a limit of CPU time."""

# Modules whose handlers raise KeyboardInterrupt by ``interrupt``.
_OWN_HANDLERS = ("train.process.stop_signals", "train.process.stop")

_CLEANUP_SECONDS = 2.0  # a disk may not answer
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


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """The signals that this process gets meanwhile. In another thread than the main one there are
    none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in handled_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_at_stop_signals() -> None:
    """From now on, until a run handles them, stop signals end the process with 143 and a line.
    SIGINT raises KeyboardInterrupt, where it did before, and a second one ends the process with
    130. A thread reads them: Python runs no handlers while the main thread is inside torch."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listening = threading.Thread(target=_listen, args=(reader, writer), name="signals", daemon=True)
    listening.start()
    for number in handled_signals():
        if number != signal.SIGINT:
            signal.signal(number, _end)
        elif signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, interrupt)
    os.register_at_fork(after_in_child=_restore_defaults)
    unblock_stop_signals()


def _listen(reader: socket.socket, _writer: socket.socket) -> None:
    """Ends the process as ``end_at_stop_signals`` says; a run that handles signals itself receives
    them in the place of this thread. It keeps the other end of the socket, to which Python
    writes them, open."""
    interrupts = 0
    while received := reader.recv(16):
        for number in received:
            interrupts += number == signal.SIGINT
            if signal.getsignal(number) is _end:
                _end(number, None)
            if interrupts > 1 and signal.getsignal(number) is interrupt:
                write_stderr("stopped.")
                _exit(Exit.STOPPED_AT_ONCE)


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler that raises KeyboardInterrupt, which ``is_of_signal`` recognises."""
    raise KeyboardInterrupt


def is_of_signal(error: BaseException) -> bool:
    """Whether an error is a KeyboardInterrupt because of SIGINT, not one that the user's code
    raises, which is a mistake like any other error."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) not in _OWN_HANDLERS:
        return True  # it may be: Python's own handler leaves no trace
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is interrupt.__code__


def _restore_defaults() -> None:
    """In a forked child, such as one of a pool that the user's code terminates. It must not write
    its signals to the parent's socket."""
    with suppress(ValueError):  # only the main thread has a wakeup fd
        signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


_ending = threading.Lock()


def _end(number: int, _frame: FrameType | None) -> None:
    """Called in the main thread and in the one that listens; one of them prints the line."""
    if not _ending.acquire(blocking=False):
        return
    write_stderr(f"stopped on request ({signal.Signals(number).name}) before a run was open.")
    _exit(Exit.PREEMPTED)


def _exit(code: Exit) -> NoReturn:
    within(_CLEANUP_SECONDS, clean_up)
    os._exit(code)
