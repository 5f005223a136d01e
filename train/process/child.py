"""Runs another command to its end, which a stop signal to this process stops."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from train.exits import StoppedError
from train.process.stop_signals import interrupt, received_signals

_POLL = 0.1


def run_child(
    command: Sequence[str], *, env: Mapping[str, str], stdout: IO[Any], stderr: IO[Any]
) -> int:
    """The exit code of a command, or -signal.

    The first stop signal that this process gets asks the command to stop, by SIGTERM, which
    torchrun passes on; a second SIGINT ends it and its processes. Once it has ended, raises
    StoppedError, or KeyboardInterrupt for SIGINT.
    """
    with received_signals() as received:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env,
            start_new_session=True,  # a terminal sends Ctrl-C to this process alone
        )  # fmt: skip
        asked = False
        try:
            while process.poll() is None and received.count(signal.SIGINT) < 2:
                if received and not asked:
                    process.terminate()
                    asked = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            _kill(process)
    if signal.SIGINT in received:
        interrupt(signal.SIGINT, None)
    if received:
        raise StoppedError(f"Stopped on request ({signal.Signals(received[0]).name}).")
    return process.returncode


def _kill(process: subprocess.Popen[Any]) -> None:
    """Ends a command that has not ended, and the processes that it has started."""
    if process.poll() is None:
        import psutil

        with suppress(psutil.Error):
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
        process.kill()
    process.wait()
