"""Meets the other nodes, looks at them, and sees a run to its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent.endpoint import wait_for_name, wait_for_port
from launch.agent.meeting import ClosedError, have_passed, meet, note_passed, round_of, why_not_met
from launch.agent.options import Options, parse
from launch.agent.signals import Signals, StopSignal
from launch.contract import Exit, RetryError, RunError, UsageError, run_directory, write_error_file

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

    from launch.agent.failure import Verdict


_PREFLIGHT = "preflight"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: that of the rank which failed first, or this agent's own."""
    signals = Signals()
    signals.install()
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        return _supervise(options, signals)
    except StopSignal as stop:
        tell(f"Stopped by {stop.number.name} while there were no ranks; nothing is lost.")
        return Exit.STOPPED_AT_ONCE if stop.number == signal.SIGINT else Exit.PREEMPTED
    except RunError as error:
        tell(f"error: {error}")
        return error.code


def tell(text: str) -> None:
    """A line on standard error."""
    print(f"isorun: {text}", file=sys.stderr, flush=True)


def _supervise(options: Options, signals: Signals) -> int:
    deadline = time.monotonic() + options.rdzv_timeout
    if options.max_nodes > 1:
        wait_for_name(options.host, options.port, deadline, tell)
        if options.node_rank not in (0, None):
            wait_for_port(options.host, options.port, deadline, tell)
    _prepare_environment(options)
    with ExitStack() as stack:
        if options.log_dir is None:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isorun-agent-")))
        else:
            logs = _own_directory(options.log_dir)
        if options.preflight == "off":
            return _run(options, options.command, meet(options), signals, logs)
        first = meet(options, _PREFLIGHT)
        code = _look(options, first, signals, logs / _PREFLIGHT)
        if code or options.preflight_only:
            return code
        # The store of the first meeting stays until that of the second is there: both are one and
        # the same to torch, so its port is never closed in between.
        second = meet(options)
        del first
        return _run(options, options.command, second, signals, logs)


def _look(options: Options, meeting: RendezvousHandler, signals: Signals, logs: Path) -> int:
    """The doctor, as the ranks of all nodes that are there; returns its exit code."""
    doctor = [sys.executable, "-m", "launch.doctor", "--level", options.preflight]
    command = [*doctor, "--", *options.command] if options.command else doctor

    def run(options: Options, meeting: RendezvousHandler) -> int:
        return _run(options, command, meeting, signals, logs, preflight=True)

    try:
        if not have_passed(meeting):
            return run(options, meeting)
    except ClosedError:
        if not have_passed(meeting):
            raise
    tell("The other nodes have been looked at already; this one is looked at alone.")
    alone = replace(
        options,
        min_nodes=1, max_nodes=1, node_rank=0, host="localhost", port=0, local_addr="127.0.0.1",
    )  # fmt: skip
    return run(alone, meet(alone, _PREFLIGHT))


def _own_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--log-dir is {str(path)!r}, where no directory can be made ({error.strerror}); name "
            "another."
        ) from None
    return path


def _prepare_environment(options: Options) -> None:
    """What the ranks are to find; they inherit it."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.processes)))
    os.environ["ISORUN_STOP_DEADLINE"] = f"{options.stop_deadline:g}"
    if options.elastic:
        # Else torchrun 2.13 never tells a node that comes later where rank 0 is.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _run(
    options: Options,
    command: Sequence[str],
    meeting: RendezvousHandler,
    signals: Signals,
    logs: Path,
    *,
    preflight: bool = False,
) -> int:
    """Runs a command as all ranks of this node, to its end; returns the exit code."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from launch.agent.elastic import NodeAgent

    # torch's agent tells the same in many more words.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(os.environ.get("LOGLEVEL", "CRITICAL"))
    tied = Path(__file__).with_name("tied.py")
    spec = WorkerSpec(
        role="rank",
        local_world_size=options.processes,
        entrypoint=sys.executable,
        args=("-S", str(tied), str(os.getpid()), *command),
        rdzv_handler=meeting,
        max_restarts=0 if preflight else options.max_restarts,
        monitor_interval=options.monitor_interval,
        local_addr=options.local_addr,
    )
    agent = NodeAgent(spec, DefaultLogsSpecs(str(logs), tee=Std.ERR), options, signals, tell)
    agent.judged = lambda verdict, node: _write(
        options,
        command,
        verdict,
        not preflight and agent.get_worker_group().group_rank == node,
        round_of(meeting),
    )
    leaving = False
    try:
        agent.run()
        if preflight and agent.verdict is None:
            note_passed(meeting)
    except StopSignal:
        leaving = True
        raise
    except RendezvousClosedError:
        raise ClosedError from None
    except RendezvousError as error:
        raise RetryError(why_not_met(options, error)) from error
    finally:
        leaving = leaving or (options.elastic and signals.first is not None)
        if not leaving:  # else it would be closed to those that stay
            meeting.shutdown()
    return agent.verdict.exit_code if agent.verdict else 0


def _write(
    options: Options,
    command: Sequence[str],
    verdict: Verdict,
    to_run: bool,
    number: int | None,
) -> None:
    """Says what happened, and leaves it where people and programs look for it."""
    from launch.agent.failure import write_record, write_termination

    tell(verdict.paragraph())
    write_error_file(RunError(verdict.paragraph()))  # where TorchX looks, if it started this agent
    record = verdict.record(
        run_id=os.environ.get("ISORUN_RUN_ID"),
        command=list(command),
        agent=socket.gethostname(),
        round=number,
    )
    directory = run_directory(command) if to_run else None
    try:
        if options.termination_log:
            write_termination(options.termination_log, record)
        if directory and directory.is_dir():
            write_record(directory, record)
    except OSError as error:
        tell(f"The failure could not be written down: {error}.")
