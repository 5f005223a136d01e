"""The commands of ``torchx`` that use a scheduler, corrected wherever isorun is installed.

Without a configured scheduler TorchX takes the first one in alphabetical order, which is a cloud's;
here the default is local. What a user or a backend has done wrong is one sentence, with isorun's
exit code. With a local job
``torchx run`` exits with the job's exit code, also after Ctrl-C. For an unknown job ``torchx log``
exits with an error instead of waiting for the job forever.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from torchx.cli.cmd_cancel import CmdCancel
from torchx.cli.cmd_describe import CmdDescribe
from torchx.cli.cmd_list import CmdList
from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.cli.cmd_status import CmdStatus
from torchx.runner import get_runner
from torchx.runner.config import apply, get_config, load_sections
from torchx.schedulers.local_scheduler import SignalException

from launch.contract import Exit, RunError, UsageError, first_line, log, visible_log
from launch.history import launch_log
from launch.torchx import options, words
from launch.torchx.refusals import refusal_of
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
            with _one_sentence("run the job"), _visible_logs():
                _check(args)
                super().run(args)
        except KeyboardInterrupt:
            _exit_after(signal.SIGINT)
        except SignalException as stop:
            _exit_after(stop.sigval)
        except SystemExit as leaving:
            # TorchX exits with 1 after any failure; the agents' exit codes tell more.
            if leaving.code == 1 and (code := launch_log.code_of_this_process()):
                sys.exit(code)
            if leaving.code == 2:  # argparse's, after its message
                sys.exit(int(Exit.USAGE))
            raise


class LogCommand(CmdLog):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Reports an unknown job, else prints the log."""
        scheduler, _, path = args.identifier.partition("://")
        session, _, names = path.partition("/")
        job, _, replica = names.partition("/")
        with _one_sentence(f"read the log of {args.identifier}"), _visible_logs():
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


class StatusCommand(CmdStatus):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Prints the state of a job."""
        with _one_sentence(f"read the state of {args.app_handle}"):
            super().run(args)


class DescribeCommand(CmdDescribe):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Prints what the scheduler knows of a job."""
        with _one_sentence(f"describe {args.app_handle}"):
            super().run(args)


class CancelCommand(CmdCancel):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Stops a job."""
        with _one_sentence(f"stop {args.app_handle}"):
            super().run(args)


class ListCommand(CmdList):  # type: ignore[misc]
    """Replaces TorchX's own command."""

    def run(self, args: argparse.Namespace) -> None:
        """Lists the jobs of a scheduler."""
        with _one_sentence(f"list the jobs of {args.scheduler}"):
            super().run(args)


def _check(args: argparse.Namespace) -> None:
    """Checks the scheduler's options and the arguments of isorun's components, of which TorchX
    ignores some and reports others with a traceback. Raises UsageError."""
    if getattr(args, "stdin", False):  # of TorchX's nightly: the arguments are JSON
        return
    with get_runner() as runner:
        known = runner.scheduler_run_opts(args.scheduler)
    cfg = options.parse(args.scheduler_args, known, args.scheduler)
    try:
        apply(args.scheduler, cfg)
        known.resolve(cfg)
    except Exception as error:  # TorchX's own exception, and built-in ones
        raise UsageError(
            f"The options of {args.scheduler} are wrong: {first_line(error)}; correct -cfg or the "
            f"section [{args.scheduler}] of .torchxconfig (`torchx runopts {args.scheduler}`)."
        ) from None
    given = [*args.component_name_and_args]
    given = given[1:] if given[:1] == ["--"] else given
    name = get_config(prefix="cli", name="run", key="component") or ""
    if given and not given[0].startswith("-"):
        name, *given = given
    if name.startswith("isorun."):
        words.check_words(name, given, load_sections(prefix="component").get(name))


@contextmanager
def _one_sentence(doing: str) -> Iterator[None]:
    """Exits with one sentence for what the user or a backend has done wrong."""
    before = threading.excepthook
    threading.excepthook = _thread_failed
    try:
        yield
    except SignalException:
        raise
    except Exception as error:
        if (refusal := refusal_of(error, doing)) is None:
            raise
        _exit_with(refusal)
    finally:
        threading.excepthook = before


class _VisibleStream:
    """A terminal that shows the control characters of what is printed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See io.TextIOBase."""
        return self._stream.write(visible_log(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _visible_logs() -> Iterator[None]:
    """Lets no terminal obey the logs that TorchX prints. Elsewhere they stay as they are."""
    before = sys.stdout, sys.stderr
    wrapped = (_VisibleStream(s) if s is not None and s.isatty() else s for s in before)
    sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", tuple(wrapped))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """For TorchX's threads, which print logs: a sentence instead of a traceback."""
    error = failure.exc_value
    refusal = refusal_of(error, "read the log") if isinstance(error, Exception) else None
    if refusal is None:
        threading.__excepthook__(failure)
    else:
        log(f"warning: {refusal}")


def _raise_stop(number: int, _: FrameType | None) -> NoReturn:
    stop = signal.Signals(number)
    # The kernel and the shell may both send it; the second one must not end the wait for the nodes.
    signal.signal(stop, signal.SIG_IGN)
    raise SignalException(f"stopped by {stop.name}", sigval=stop)


def _exit_with(error: RunError) -> NoReturn:
    for line in str(error).splitlines():
        log(f"error: {line}")
    handle, end = launch_log.of_this_process()
    if handle and not end:
        log(f"{handle} was submitted before, so do not submit it again.")
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
