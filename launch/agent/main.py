"""Joins the other nodes, runs the preflight, and supervises a run until it ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent.arguments import CODE_NOTES
from launch.agent.command import (
    check_startable,
    doctor_command,
    rank_command,
    refusal,
)
from launch.agent.failure import Outcome
from launch.agent.options import AgentOptions, parse
from launch.agent.records import directory_of, record_outcome, record_own_end, tell_last_failure
from launch.agent.rendezvous import (
    ClosedError,
    failure_of,
    join,
    note_preflight_passed,
    preflight_passed,
    round_of,
)
from launch.agent.restarts import Restart, check_restart
from launch.agent.signals import Signals, StopSignal
from launch.contract import (
    LAUNCHER,
    SECRET,
    SECRET_FILE,
    STOP_DEADLINE,
    SUBMITTED_AT,
    TYPED,
    Exit,
    RetryError,
    RunError,
    UsageError,
    exit_code_of,
    fault_of,
    first_line,
    log,
    threads_per_process,
    wait_for_name,
    wait_for_port,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

_PREFLIGHT = "preflight"
_TELL_AFTER = 5.0
"""Seconds from the start of the agent to the line about the last failure. Usually the ranks or the
preflight have started by then, or the agent is waiting for other nodes."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.agent") -> int:
    """Returns the exit code: that of the rank which failed first, or the agent's own."""
    signals = Signals()
    signals.install()

    def supervise() -> int:
        options = None
        try:
            options = parse(sys.argv[1:] if argv is None else argv, prog=prog)
            return _supervise(options, signals)
        except StopSignal as stop:
            signals.interruptible = lambda: False  # a second one must not interrupt the exit
            text = f"Stopped by {stop.number.name} while no ranks were running; nothing is lost."
            log(text)
            code = Exit.STOPPED_AT_ONCE if stop.number == signal.SIGINT else Exit.PREEMPTED
            if options and options.termination_log:
                record_own_end(options, code, text)
            return code
        except Exception as error:
            signals.interruptible = lambda: False
            if options:
                unknown = error if isinstance(error, RunError) else RunError(first_line(error))
                known = fault_of(error, unknown)
                record_own_end(options, known.code, str(known))
            raise

    return exit_code_of(supervise)


def _supervise(options: AgentOptions, signals: Signals) -> int:
    refused = _refused(options)
    _check_restart(options)
    if options.max_nodes > 1:
        if not options.secret:
            log(
                f"{SECRET} is not set, so whoever reaches the ports of this run can change its "
                "messages (docs/security.md)."
            )
        _wait_for_node_0(options)
    _prepare_environment(options)
    _tell_notes()
    if options.termination_log and options.node_rank in (0, None):
        # Not during the start: it loads the config, beside the import of torch, in this process.
        teller = threading.Timer(_TELL_AFTER, tell_last_failure, [options.command, time.time()])
        teller.daemon = True
        teller.start()
    with ExitStack() as stack:
        if options.log_dir is None:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isorun-agent-")))
        else:
            logs = _make_directory(options.log_dir)
        if options.preflight == "off":
            return _run(options, options.command, join(options), signals, logs, refused=refused)
        first = join(options, _PREFLIGHT)
        code = _check_nodes(options, first, signals, logs / _PREFLIGHT)
        if code or options.preflight_only:
            return code
        # The first rendezvous stays until the second exists: torch uses one store for both, so
        # its port is never closed in between.
        second = join(options, former=first)
        del first
        return _run(options, options.command, second, signals, logs, refused=refused)


def _check_restart(options: AgentOptions) -> None:
    """Raises ResumeRefusedError on node 0 if a JobSet has restarted the run for too long."""
    restart = Restart.of(os.environ)
    if not (restart and restart.number and options.restart_deadline) or options.node_rank != 0:
        return  # before the config is loaded
    if directory := directory_of(options.command):
        check_restart(directory, restart, options.restart_deadline)


def _tell_notes() -> None:
    """Logs what was noticed when the submitted code was unpacked."""
    with suppress(OSError, KeyError):
        for note in Path(os.environ[CODE_NOTES]).read_text(encoding="utf-8").splitlines():
            log(f"warning: {note}")


def _refused(options: AgentOptions) -> str:
    """Why the command cannot be started here, though the other nodes may be able to; else empty.
    Raises UsageError if there are no other nodes."""
    try:
        if options.command:
            check_startable(options.command)
    except UsageError as error:
        if options.max_nodes == 1:
            raise
        log(f"error: {error}")
        return f"On {socket.gethostname()}: {error}"
    return ""


def _wait_for_node_0(options: AgentOptions) -> None:
    """Returns when node 0 can be reached. Raises RetryError after ``--rdzv-timeout``."""
    deadline = time.monotonic() + options.rdzv_timeout
    host, port = options.host, options.port
    wait_for_name(
        host, port, deadline, f"the name {host!r} of the rendezvous to resolve (--rdzv-timeout)",
        "Check its spelling, that node 0 was started, and that DNS works here.", log,
    )  # fmt: skip
    if options.node_rank not in (0, None):
        wait_for_port(
            host, port, deadline, f"node 0 to listen at {host}:{port} (--rdzv-timeout)",
            "Check that node 0 was started, and that no firewall or network policy blocks the "
            "port.", log,
        )  # fmt: skip


def _check_nodes(
    options: AgentOptions, handler: RendezvousHandler, signals: Signals, logs: Path
) -> int:
    """Runs the doctor as the ranks of all nodes; returns its exit code."""
    command = doctor_command(options.preflight, options.command)

    def run(options: AgentOptions, handler: RendezvousHandler) -> int:
        return _run(options, command, handler, signals, logs, preflight=True)

    try:
        if not preflight_passed(handler):
            return run(options, handler)
    except ClosedError:
        if not preflight_passed(handler):
            raise
    log("The other nodes have passed the preflight; this node is checked alone.")
    alone = replace(
        options,
        min_nodes=1, max_nodes=1, node_rank=0, host="localhost", port=0, local_addr="127.0.0.1",
    )  # fmt: skip
    return run(alone, join(alone, _PREFLIGHT))


def _make_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wrong = UsageError(
            f"--log-dir is {str(path)!r}, which cannot be created ({error.strerror}); name another "
            "directory."
        )
        raise fault_of(error, wrong) from None
    return path


def _prepare_environment(options: AgentOptions) -> None:
    """Sets what the ranks inherit."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(options.processes)))
    os.environ[LAUNCHER] = "isorun agent"
    os.environ.setdefault(SUBMITTED_AT, f"{time.time():.3f}")
    os.environ[STOP_DEADLINE] = f"{options.stop_deadline:g}"
    if options.max_nodes == 1 and not os.environ.get(SECRET_FILE, "").strip():
        # One process has nobody to exchange messages with. Several ranks use this node's secret.
        os.environ.pop(SECRET, None)
        if options.processes > 1:
            os.environ[SECRET] = options.secret.decode(errors="surrogateescape")
    if options.command and Path(options.command[0]).name == "isorun":
        os.environ[TYPED] = options.command[0]
    else:
        os.environ.pop(TYPED, None)
    if options.elastic:
        # Otherwise torch 2.13 does not tell a node that joins later where rank 0 is.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _run(
    options: AgentOptions,
    command: Sequence[str],
    handler: RendezvousHandler,
    signals: Signals,
    logs: Path,
    *,
    preflight: bool = False,
    refused: str = "",
) -> int:
    """Runs a command as all ranks of this node until they end; returns the exit code. With
    ``refused``, a reason, the ranks only report it."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from launch.agent.elastic import NodeAgent

    # torch's agent logs the same failures at greater length.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(os.environ.get("LOGLEVEL", "CRITICAL"))
    start_rank = Path(__file__).with_name("start_rank.py")
    started = refusal(refused) if refused else rank_command(command)
    spec = WorkerSpec(
        role="rank",
        local_world_size=options.processes,
        entrypoint=sys.executable,
        args=("-S", str(start_rank), str(os.getpid()), *started),
        rdzv_handler=handler,
        max_restarts=0 if preflight else options.max_restarts,
        monitor_interval=options.monitor_interval,
        local_addr=options.local_addr,
    )

    def on_failure(outcome: Outcome, writes_record: bool) -> None:
        in_run = writes_record and not options.preflight_only
        own = options.command or command  # not that of the preflight
        record_outcome(options, own, outcome, round_of(handler), in_run_directory=in_run)

    logs_specs = DefaultLogsSpecs(str(logs), tee=Std.ERR)
    agent = NodeAgent(spec, logs_specs, options, signals, log, on_failure)
    leaving = False
    try:
        agent.run()
        if preflight and agent.outcome is None:
            note_preflight_passed(handler)
    except StopSignal:
        leaving = True
        raise
    except RendezvousClosedError:
        raise ClosedError from None
    except RendezvousError as error:
        raise RetryError(failure_of(options, error)) from error
    finally:
        leaving = leaving or (options.elastic and signals.first is not None)
        if not leaving:  # otherwise it would be closed to the nodes that stay
            handler.shutdown()
    return agent.outcome.exit_code if agent.outcome else 0
