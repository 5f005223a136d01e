"""``torchx run`` and ``torchx log``, mended for all who have isorun installed.

Without a configured scheduler the default is the first registered one, by the alphabet, which
would be a cloud; it stays a local one. A user's mistake is told in one sentence, with an exit code
that means something; so has the end of a local job, a Ctrl-C included. And ``torchx log`` would
wait for ever for a job that is not there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from typing import NoReturn

from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.runner import get_runner
from torchx.runner.config import get_config
from torchx.schedulers.local_scheduler import SignalException

from launch.contract import RunError, UsageError
from launch.history import ledger
from launch.local import log_directory

DEFAULT = "local_cwd"
_TO_READ = 2.0  # seconds for what a job said last


class Run(CmdRun):  # type: ignore[misc]
    """Takes the place of TorchX's own command (entry point group ``torchx.cli.cmds``)."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """TorchX's, with another default."""
        super().add_arguments(subparser)
        if get_config(prefix="cli", name="run", key="scheduler") is None:
            subparser.set_defaults(scheduler=DEFAULT)

    def run(self, args: argparse.Namespace) -> None:
        """Submits, and waits for what is local."""
        try:
            super().run(args)
        except RunError as error:
            _refuse(error)
        except KeyboardInterrupt:
            _leave(signal.SIGINT)
        except SignalException as stop:
            _leave(stop.sigval)
        except SystemExit as leaving:
            # TorchX says 1 for everything; the agents know better.
            if leaving.code == 1 and (code := ledger.code_of_this_process()):
                sys.exit(code)
            raise


def _refuse(error: RunError) -> NoReturn:
    for line in str(error).splitlines():
        print(f"isorun: error: {line}", file=sys.stderr)
    sys.exit(int(error.code))


def _leave(number: signal.Signals) -> NoReturn:
    """Ends after a signal: with the code of the job if that has ended by it."""
    deadline = time.monotonic() + _TO_READ
    for thread in threading.enumerate():
        if thread.daemon:  # TorchX's, which still read the log
            thread.join(max(0.0, deadline - time.monotonic()))
    handle, end = ledger.of_this_process()
    if end:
        print(f"isorun: stopped by {number.name}: {handle} is {end['state']}.", file=sys.stderr)
    elif handle:
        print(
            f"isorun: {number.name} ends this command, but not {handle}; `torchx status`, `log` "
            "and `cancel` take that name.",
            file=sys.stderr,
        )
    code = ledger.telling_code(end["exit_codes"]) if end else None
    sys.exit(code or 128 + number)


class Log(CmdLog):  # type: ignore[misc]
    """Takes the place of TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Tells of a job that is not there, else as TorchX does."""
        scheduler, _, path = args.identifier.partition("://")
        session, _, names = path.partition("/")
        job, _, replica = names.partition("/")
        try:
            if scheduler == "local_cwd" and job:
                log_directory(job)
            elif job and not replica.partition("/")[2]:
                handle = f"{scheduler}://{session or 'default'}/{job}"
                if get_runner().status(handle) is None:
                    raise UsageError(f"{scheduler} knows no job {job!r}, or knows it no longer.")
            super().run(args)
        except RunError as error:
            _refuse(error)
