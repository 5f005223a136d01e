"""``torchx run`` and ``torchx log``, corrected wherever isorun is installed.

Without a configured scheduler TorchX takes the first one in alphabetical order, which is a cloud's;
here the default is local. Usage errors are one sentence, with isorun's exit code. With a local job
``torchx run`` exits with the job's exit code, also after Ctrl-C. For an unknown job ``torchx log``
exits with an error instead of waiting for the job forever.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.runner import get_runner
from torchx.runner.config import get_config
from torchx.schedulers.local_scheduler import SignalException

from launch.contract import RunError, UsageError, log
from launch.history import launch_log
from launch.torchx.schedulers.local_scheduler import log_directory

DEFAULT_SCHEDULER = "local_cwd"
_LOG_SECONDS = 2.0  # for TorchX's threads to print the end of a job's log


class RunCommand(CmdRun):  # type: ignore[misc]
    """Replaces TorchX's own command (entry point group ``torchx.cli.cmds``)."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """TorchX's arguments with another default."""
        super().add_arguments(subparser)
        if get_config(prefix="cli", name="run", key="scheduler") is None:
            subparser.set_defaults(scheduler=DEFAULT_SCHEDULER)

    def run(self, args: argparse.Namespace) -> None:
        """Submits, and waits for a local job."""
        # By default a terminal that closes would end this process at once, and TorchX's handlers
        # are for SIGTERM and SIGINT only; the nodes of a local job would keep running.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _raise_stop)
        try:
            super().run(args)
        except RunError as error:
            _exit_with(error)
        except KeyboardInterrupt:
            _exit_after(signal.SIGINT)
        except SignalException as stop:
            _exit_after(stop.sigval)
        except SystemExit as leaving:
            # TorchX exits with 1 after any failure; the agents' exit codes tell more.
            if leaving.code == 1 and (code := launch_log.code_of_this_process()):
                sys.exit(code)
            raise


class LogCommand(CmdLog):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Reports an unknown job, else prints the log."""
        scheduler, _, path = args.identifier.partition("://")
        session, _, names = path.partition("/")
        job, _, replica = names.partition("/")
        try:
            if scheduler == "local_cwd" and job:
                log_directory(job)
            elif job and not replica.partition("/")[2]:
                handle = f"{scheduler}://{session or 'default'}/{job}"
                if get_runner().status(handle) is None:
                    raise UsageError(
                        f"{scheduler} has no job {job!r}, or has removed it; list its jobs with "
                        f"`torchx list -s {scheduler}`."
                    )
            super().run(args)
        except RunError as error:
            _exit_with(error)


def _raise_stop(number: int, _: FrameType | None) -> NoReturn:
    stop = signal.Signals(number)
    # The kernel and the shell may both send it; the second one must not end the wait for the nodes.
    signal.signal(stop, signal.SIG_IGN)
    raise SignalException(f"stopped by {stop.name}", sigval=stop)


def _exit_with(error: RunError) -> NoReturn:
    for line in str(error).splitlines():
        log(f"error: {line}")
    sys.exit(int(error.code))


def _exit_after(number: signal.Signals) -> NoReturn:
    """Exits after a signal: with the exit code of the job, if the job has ended."""
    deadline = time.monotonic() + _LOG_SECONDS
    for thread in threading.enumerate():
        if thread.daemon:  # TorchX's, which print the log
            thread.join(max(0.0, deadline - time.monotonic()))
    handle, end = launch_log.of_this_process()
    if end:
        log(f"stopped by {number.name}: {handle} is {end['state']}.")
    elif handle:
        log(
            f"stopped by {number.name}, but {handle} keeps running; use this name with `torchx "
            "status`, `torchx log` and `torchx cancel`."
        )
    code = launch_log.first_failure_code(end["exit_codes"]) if end else None
    sys.exit(code or 128 + number)
