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
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent.endpoint import wait_for_name, wait_for_port
from launch.agent.options import Options, parse
from launch.agent.signals import Signals, StopSignal
from launch.training import run_directory
from train.exits import Exit, RetryError, RunError

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

    from launch.agent.failure import Verdict


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
            logs = options.log_dir
        code = 0
        meeting = _meeting(options, "preflight" if options.preflight != "off" else "")
        if options.preflight != "off":
            doctor = [sys.executable, "-m", "launch.doctor", "--level", options.preflight]
            command = [*doctor, "--", *options.command] if options.command else doctor
            code = _run(options, command, meeting, signals, logs / "preflight", record=False)
            if code == 0 and not options.preflight_only:
                # The store of the first meeting stays until that of the second is there: both
                # are one and the same to torch, so its port is never closed in between.
                first, meeting = meeting, _meeting(options, "")
                del first
        if code == 0 and not options.preflight_only:
            code = _run(options, options.command, meeting, signals, logs, record=True)
        return code


def _prepare_environment(options: Options) -> None:
    """What the ranks are to find; they inherit it."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.processes)))
    os.environ["ISORUN_STOP_DEADLINE"] = f"{options.stop_deadline:g}"
    if options.elastic:
        # Else torchrun 2.13 never tells a node that comes later where rank 0 is.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _meeting(options: Options, suffix: str) -> RendezvousHandler:
    """torch's rendezvous. Raises RetryError where its store cannot be reached."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousError,
        RendezvousParameters,
        registry,
    )

    # Nodes that are lost are missed after some seconds.
    settings: dict[str, str | int] = {
        "timeout": int(options.rdzv_timeout),
        "join_timeout": int(options.rdzv_timeout),
        "last_call_timeout": 1,
        "keep_alive_interval": 1,
        "keep_alive_max_attempt": 5,
    }
    if options.node_rank is not None:
        settings["is_host"] = int(options.node_rank == 0)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{options.host}:{options.port}",
        run_id="-".join(filter(None, (options.rdzv_id, suffix))),
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=options.local_addr,
        **{**settings, **options.rdzv_conf},
    )
    try:
        return registry.get_rendezvous_handler(parameters)
    except RendezvousError as error:
        raise RetryError(
            f"The rendezvous at {options.host}:{options.port} failed "
            f"({error.__cause__ or error}); see whether node 0 runs there and the port is free."
        ) from error


def _run(
    options: Options,
    command: Sequence[str],
    meeting: RendezvousHandler,
    signals: Signals,
    logs: Path,
    *,
    record: bool,
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
        max_restarts=options.max_restarts if record else 0,
        monitor_interval=options.monitor_interval,
        local_addr=options.local_addr,
    )
    agent = NodeAgent(spec, DefaultLogsSpecs(str(logs), tee=Std.ERR), options, signals, tell)
    agent.judged = lambda verdict, node: _write(
        options, command, verdict, record and agent.get_worker_group().group_rank == node
    )
    leaving = False
    try:
        agent.run()
    except StopSignal:
        leaving = True
        raise
    except RendezvousClosedError:
        raise RetryError(
            "The other nodes have ended the run, or given it up; their own messages say why."
        ) from None
    except RendezvousError as error:
        raise RetryError(_not_met(options, error)) from error
    finally:
        leaving = leaving or (options.elastic and signals.first is not None)
        if not leaving:  # else it would be closed to those that stay
            meeting.shutdown()
    return agent.verdict.exit_code if agent.verdict else 0


def _not_met(options: Options, error: Exception) -> str:
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    where = f"at {options.host}:{options.port}"
    if isinstance(error, RendezvousTimeoutError):
        wanted = f"{options.min_nodes}" + (" or more" if options.elastic else "")
        return (
            f"Not all of {wanted} nodes came to the rendezvous {where} within --rdzv-timeout, "
            f"{options.rdzv_timeout:g} s; see which node was not started, or cannot reach it."
        )
    return (
        f"The node that keeps the rendezvous {where} is gone or cannot be reached any more; start "
        "the run again to go on from its last checkpoint."
    )


def _write(options: Options, command: Sequence[str], verdict: Verdict, to_run: bool) -> None:
    """Says what happened, and leaves it where people and programs look for it."""
    from launch.agent.failure import write_record, write_termination
    from train.error_file import leave

    tell(verdict.paragraph())
    leave(RunError(verdict.paragraph()))  # where TorchX looks, if it started this agent
    record = verdict.record(
        run_id=os.environ.get("ISORUN_RUN_ID"), command=list(command), agent=socket.gethostname()
    )
    directory = run_directory(command) if to_run else None
    try:
        if options.termination_log:
            write_termination(options.termination_log, record)
        if directory and directory.is_dir():
            write_record(directory, record)
    except OSError as error:
        tell(f"The failure could not be written down: {error}.")
