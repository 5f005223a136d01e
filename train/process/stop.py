"""Stop requests by signal or by file; the loop acts on them between units of work."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.exits import Exit
from train.numeric_text import seconds_in
from train.process.abrupt_end import AbruptEnd, within
from train.process.emergency_output import write_stderr
from train.process.stop_signals import STOP_SIGNALS, TERMINATING, handled_signals, interrupt
from train.section import Section, non_semantic

_STOP_FILE_INTERVAL = 1.0  # seconds between checks of the stop file
_READ_TIMEOUT = 1.0  # seconds to find the last checkpoint after the deadline


class StopConfig(Section):
    """Deadlines of a requested stop."""

    deadline: float | None = non_semantic(30.0, gt=0.0)
    """Seconds from SIGTERM, SIGHUP or SIGQUIT to the end of the process, whether it has saved or
    not. The environment variable ISORUN_STOP_DEADLINE takes precedence. null: no deadline."""

    margin: float = non_semantic(3.0, ge=0.0)
    """Seconds before the deadline at which an unfinished save is abandoned."""


class StopRequest:
    """A context manager in which the signals of ``stop_signals.py`` request a stop; a second SIGINT
    stops without saving.

    A thread reads the signals, because Python runs no signal handlers while the main thread blocks
    inside torch, for example in a collective.

    ``in_session``: the process is a script or notebook that continues after the run. Then a second
    SIGINT, or one before the first step, raises KeyboardInterrupt in the main thread instead of
    ending the process, and the handlers are restored at the end. In another thread than the main
    one, where Python allows no handlers, only the stop file requests a stop.
    """

    def __init__(self, config: StopConfig, *, in_session: bool = False) -> None:
        self.signal: str | None = None
        self.abrupt_end = AbruptEnd()
        self._starting = True  # there is nothing to save yet: a signal ends the process
        self._resume_point: Callable[[], str] = lambda: ""
        self._config, self._in_session = config, in_session
        self._listening = False
        self._interrupts = 0  # calls of the Python handler for SIGINT
        self._stop_at_once = self._raised = self._woken = False
        self._asked_by_ctrl_c = False
        self._deadline = stop_deadline(config)
        self._file: Path | None = None
        self._checked = 0.0
        self._timer: threading.Timer | None = None
        self._too_late_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was requested from this process; other ranks may not know of it yet."""
        if self.signal is None and self._file is not None:
            now = time.monotonic()
            if now - self._checked > _STOP_FILE_INTERVAL:
                self._checked = now
                if self._file.exists():
                    self.signal = "stop file"
        return self.signal is not None

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline less the margin; infinity without a deadline."""
        return math.inf if self._too_late_at is None else self._too_late_at - time.monotonic()

    def ranks_joined(self) -> None:
        """From now on a signal requests a stop that all ranks agree on; before, with nothing to
        save and perhaps no other rank to agree with, it ends the process."""
        self._starting = False

    def watch_file(self, file: Path) -> None:
        """Treats the existence of this file as a request to stop from now on."""
        self._file = file

    def report_at_deadline(self, resume_point: Callable[[], str]) -> None:
        """Calls ``resume_point`` when the deadline passes, and appends its sentence, which says
        from where the run resumes, to the error."""
        self._resume_point = resume_point

    def __enter__(self) -> StopRequest:
        if self._in_session and threading.current_thread() is not threading.main_thread():
            return self
        self._listening = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_signals)
        for number in handled_signals():
            # Python writes to the socket only for signals that have a handler.
            self._previous[number] = signal.signal(number, self._raise_interrupt)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._listening:
            return
        if self._timer:
            self._timer.cancel()
        self._raised = True  # the thread must not wake the main thread any more
        for number, handler in self._previous.items():
            # The process ends now with the run's exit code. A launcher that signals again, or
            # because another rank has ended, must not turn this into a death by signal. Ctrl-C
            # without an earlier request still ends an exit that hangs.
            ignored = not self._in_session and (self.signal or number != signal.SIGINT)
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _raise_interrupt(self, number: int, _frame: object) -> None:
        """The Python signal handler. It runs in the main thread, while that is not inside torch;
        signals that arrive meanwhile cause one call."""
        if not self._in_session or number != signal.SIGINT:
            return
        if self._raised and self._woken:
            self._woken = False  # the call that _wake_main_thread has caused is not needed
            return
        self._interrupts += 1
        if self._starting or self._stop_at_once or self._interrupts > 1:
            self._raised = True
            interrupt(number, None)

    def _wake_main_thread(self) -> None:
        """Causes another call of the handler, which may have run between two signals."""
        if not self._raised:
            self._woken = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _listen(self) -> None:
        while received := self._reader.recv(16):
            for number in received:
                if number in STOP_SIGNALS:
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        second = number == signal.SIGINT and self._asked_by_ctrl_c
        self._asked_by_ctrl_c = self._asked_by_ctrl_c or number == signal.SIGINT
        if self._in_session and number == signal.SIGINT and (self._starting or second):
            if second and not self._stop_at_once:
                self._stop_at_once = True
                self._wake_main_thread()
            return  # _raise_interrupt raises
        if self._starting:
            write_stderr("stopped on request before the first step; no work is lost.")
            os._exit(Exit.PREEMPTED)
        if second:
            write_stderr("stopped without saving.")
            self.abrupt_end.end(Exit.STOPPED_AT_ONCE, "stopped by a second Ctrl-C, without saving")
        self.signal = number.name
        if number == signal.SIGINT:
            write_stderr(
                "finishing the step and saving; press Ctrl-C again to stop without saving."
            )
        if number in TERMINATING and self._timer is None:
            self._start_timer()

    def _start_timer(self) -> None:
        deadline = self._deadline
        if deadline is not None:
            wait = max(0.0, deadline - self._config.margin)
            self._too_late_at = time.monotonic() + wait
            self._timer = threading.Timer(wait, self._too_late, (deadline,))
            self._timer.daemon = True
            self._timer.start()

    def _too_late(self, deadline: float) -> None:
        """Runs in the timer's thread, because the main thread may be blocked."""
        text = (
            f"did not stop within stop.deadline ({deadline:g} s, less stop.margin "
            f"{self._config.margin:g} s)"
        )
        point = within(_READ_TIMEOUT, self._resume_point)
        write_stderr(
            f"error: {text}. {point or 'Rerun to resume from the last committed checkpoint.'}"
        )
        self.abrupt_end.end(Exit.RETRY, text)


def _forget_signals() -> None:
    """Keeps a forked child from writing its signals to the parent's socket."""
    with suppress(ValueError):  # only the main thread has a wakeup fd
        signal.set_wakeup_fd(-1)


def stop_deadline(config: StopConfig) -> float | None:
    """Seconds from SIGTERM to the end of the process; None for no deadline."""
    return seconds_in(os.environ, "ISORUN_STOP_DEADLINE") or config.deadline
