"""Requests to stop: signals and a file are noted, and acted upon between two pieces of work."""

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

from train.exits import Exit, UsageError
from train.process.emergency_output import write_stderr
from train.section import Section, non_semantic

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SECONDS_BETWEEN_LOOKS = 1.0  # at the stop file


class StopConfig(Section):
    """How a run that is asked to stop comes to its end."""

    deadline: float | None = non_semantic(30.0, gt=0.0)
    """Seconds after a SIGTERM within which the process ends, saved or not; the environment
    variable ISORUN_STOP_DEADLINE wins. null: as long as it takes."""

    margin: float = non_semantic(3.0, ge=0.0)
    """So many seconds before the deadline it is given up, if it cannot be met."""


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second SIGINT stops at once.

    A thread reads the signals, so that they are heard while the main thread waits inside torch,
    where Python runs no handlers: for ranks that do not come, or in an operation that hangs.

    ``in_session``: the process belongs to a script or notebook that goes on after the run. A
    second SIGINT, or one before the first step, then raises KeyboardInterrupt in the main thread
    instead of ending the process, and at the end the handlers are what they were. Entered in
    another thread than the main one, where Python allows no handlers, only the stop file asks.
    """

    def __init__(self, config: StopConfig, *, in_session: bool = False) -> None:
        self.signal: str | None = None
        self.starting = True
        """There is nothing to save yet, and perhaps nobody to agree with: stop at once."""
        self.describe_lost_steps: Callable[[], str] = lambda: ""
        """Told when the deadline passes: what the run goes on from."""
        self._config, self._in_session = config, in_session
        self._listening = False
        self._interrupts = 0
        self._deadline = _deadline(config)
        self._file: Path | None = None
        self._looked = 0.0
        self._timer: threading.Timer | None = None
        self._too_late_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        if self.signal is None and self._file is not None:
            now = time.monotonic()
            if now - self._looked > _SECONDS_BETWEEN_LOOKS:
                self._looked = now
                if self._file.exists():
                    self.signal = "stop file"
        return self.signal is not None

    @property
    def seconds_left(self) -> float:
        """Until the deadline of a stop passes, less the margin; infinite where there is none."""
        return math.inf if self._too_late_at is None else self._too_late_at - time.monotonic()

    def watch_file(self, file: Path) -> None:
        """From now on a file of this name is a request, too."""
        self._file = file

    def __enter__(self) -> StopRequest:
        if self._in_session and threading.current_thread() is not threading.main_thread():
            return self
        self._listening = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_signals)
        for number in _SIGNALS:
            # Python writes to the socket only for signals that have a handler.
            self._previous[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._listening:
            return
        if self._timer:
            self._timer.cancel()
        for number, handler in self._previous.items():
            # One that was asked is on its way out, and a launcher that repeats it while the others
            # end must not kill it: it would look like a rank that saved nothing.
            ignored = self.signal and not self._in_session
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, _frame: object) -> None:
        """Python's own handler, which runs in the main thread, if that is not within torch."""
        if self._in_session and number == signal.SIGINT:
            self._interrupts += 1
            if self.starting or self._interrupts > 1:
                raise KeyboardInterrupt

    def _listen(self) -> None:
        while received := self._reader.recv(16):
            for number in received:
                if number in _SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        # Straight to the kernel in both cases: nothing after this may wait, hang or write. What
        # is half written bears a temporary name and is swept at the next start.
        if self._in_session and number == signal.SIGINT and (self.starting or self.signal):
            return  # _handle raises
        if self.starting:
            write_stderr("stopped on request before the first step; nothing is lost.")
            os._exit(Exit.PREEMPTED)
        if number == signal.SIGINT and self.signal == "SIGINT":
            write_stderr("stopped at once, without saving.")
            os._exit(Exit.STOPPED_AT_ONCE)
        self.signal = number.name
        if number == signal.SIGINT:
            write_stderr("finishing the step and saving; Ctrl-C again stops at once.")
        if number == signal.SIGTERM and self._timer is None:
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
        """In the timer's thread: the main one may be deep in a step, or stuck."""
        write_stderr(
            f"error: not stopped within stop.deadline, {deadline:g} s less a margin of "
            f"{self._config.margin:g} s. {self.describe_lost_steps()}"
        )
        os._exit(Exit.RETRY)


def _forget_signals() -> None:
    """A child's signals are not its parent's."""
    with suppress(ValueError):  # not the main thread: it has none
        signal.set_wakeup_fd(-1)


def _deadline(config: StopConfig) -> float | None:
    text = os.environ.get("ISORUN_STOP_DEADLINE", "").strip()
    try:
        return float(text) if text else config.deadline
    except ValueError:
        raise UsageError(
            f"ISORUN_STOP_DEADLINE must be a number of seconds, but is {text!r} (environment)."
        ) from None
