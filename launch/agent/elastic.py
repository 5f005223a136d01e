"""torch's elastic agent, extended: the meaning of a failure decides whether ranks are restarted."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousStateError

from launch import deadlines
from launch.agent.failure import (
    Outcome,
    RankFailure,
    error_of,
    shell_code,
    tail,
    write_termination,
)
from launch.agent.keepalive import end_connections, set_keepalive
from launch.agent.options import AgentOptions
from launch.agent.rendezvous import (
    forget_round,
    has_started,
    missing_nodes,
    round_of,
    store_lost,
    waiting_for,
)
from launch.agent.reports import Report, Reports
from launch.agent.signals import Signals, StopSignal
from launch.contract import Exit, Messages, RetryError, Signer, first_line

_CHECK_OTHERS = 1.0  # seconds between two checks of the other nodes' reports
_TO_NOTICE = 5.0  # seconds for ranks to detect by themselves that others are gone, and report it
_TO_END = 10  # seconds for ranks to end after others have failed
_TO_DIE = 3  # seconds for ranks to end after SIGKILL
_TO_REPORT = 25.0  # seconds for other nodes to report: longer than _TO_NOTICE and _TO_END
# How a rank ends after SIGTERM: by the signal, killed, with a checkpoint, or without its peers.
_ENDS_OF_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGKILL, Exit.PREEMPTED, Exit.RETRY)


class NodeAgent(LocalElasticAgent):
    """The ranks of one node. ``signals`` are forwarded to them while ``run`` is active."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        options: AgentOptions,
        signals: Signals,
        log: Callable[[str], None],
        on_failure: Callable[[Outcome, bool], None],
    ) -> None:
        """``log`` prints a line; ``on_failure`` is called with each outcome, and whether this node
        is the one that writes the record of it."""
        super().__init__(
            spec,
            logs_specs,
            log_line_prefix_template=f"[{socket.gethostname()}:${{rank}}] ",
            shutdown_timeout=int(options.shutdown_timeout),
        )
        self.outcome: Outcome | None = None
        """How the ranks ended; None while they run, and if all exited with 0."""
        self._options, self._signals, self._log = options, signals, log
        self._on_failure = on_failure
        self._reports: Reports | None = None
        self._overdue: set[int] = set()
        self._round: int | None = None
        self._checked = 0.0
        self._failed_elsewhere_at: float | None = None
        self._ended_for_lost: set[int] = set()
        self._lost = ""
        """Which other node is lost, as a sentence without full stop."""
        self._store_is_lost = False
        # torch calls it after each check of healthy ranks. Its error would end them without a
        # report, and wait for them for the whole shutdown timeout.
        self._nodes_waiting = spec.rdzv_handler.num_nodes_waiting
        spec.rdzv_handler.num_nodes_waiting = self._num_nodes_waiting  # type: ignore[method-assign]

    # -- steps of torch's loop that differ -----------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler = worker_group.spec.rdzv_handler
        before = self._round
        # If the others start their ranks, this node must start its own, and stops them then.
        # This comes first, so that no signal is missed in between.
        self._signals.interruptible = lambda: not has_started(handler, before)
        if self._signals.first:
            raise StopSignal(self._signals.first)
        forget_round(handler)
        try:
            with waiting_for(
                lambda: missing_nodes(self._options, handler), "The nodes have joined"
            ):
                super()._rendezvous(worker_group)
        except RuntimeError as error:  # of the store
            raise RetryError(
                "A node fell silent while the nodes exchanged addresses and ranks "
                f"({first_line(error)}). Rerun to resume from the last checkpoint."
            ) from error
        except (LookupError, TypeError, ValueError) as error:
            # torch expects that nobody else writes to its store.
            raise RetryError(
                "The nodes found values in the store of the rendezvous that none of them writes "
                f"({first_line(error)}). Check who can reach its port (docs/security.md), then "
                "rerun."
            ) from error
        self._signals.interruptible = lambda: False
        self._round = round_of(handler)
        self.outcome, self._failed_elsewhere_at, self._lost = None, None, ""
        self._overdue, self._ended_for_lost = set(), set()
        set_keepalive(self._options.port)
        node, nodes = self._place
        signer = Signer(self._options.secret, handler.get_run_id())
        messages = Messages(cast("Any", worker_group.store), signer, f"round {self._round}")
        self._reports = Reports(messages, node, nodes)
        if nodes > 1:
            ranks = [worker.global_rank for worker in worker_group.workers]
            self._log(
                f"{socket.gethostname()} is node {node} of {nodes} with ranks {ranks[0]} to "
                f"{ranks[-1]} of {worker_group.workers[0].world_size}."
            )

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # torch replaces our signal handlers while it starts the ranks, so that a signal ends the
        # agent with an error. start_rank.py removes the variable from the ranks' environment.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"
        return cast("dict[int, Any]", super()._start_workers(worker_group))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._signals.first:
            self._forward_signals()
        ended = self._ended()
        if ended and set(ended.values()) == {Exit.PREEMPTED}:
            # The ranks have agreed to stop; others may still copy the checkpoint.
            self._forward_signals(time.monotonic() + self._options.shutdown_timeout)
        elif ended:
            # The others cannot continue; torch would wait for them longer than other nodes do.
            self._ranks.close(signal.SIGTERM, _TO_END)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self._peers_are_gone():
            ended = self._ended()
            self._ranks.close(signal.SIGTERM, _TO_END)
            result = super()._monitor_workers(worker_group)
        if result.state not in (WorkerState.HEALTHY, WorkerState.SUCCEEDED):
            self._decide(result, ended)
        return result

    # -- stopping -----------------------------------------------------------------------------

    def _forward_signals(self, deadline: float | None = None) -> None:
        """Forwards signals and waits until the ranks have ended; other nodes learn of a stop from
        the ranks, which agree on it. After SIGTERM the ranks have ``shutdown_timeout`` seconds, but
        only a few after another node is lost, since then they cannot agree any more."""
        while None in self._return_codes().values():
            self._look_at_others()
            if self._lost:
                codes = self._return_codes()
                self._ended_for_lost = {rank for rank, code in codes.items() if code is None}
                self._ranks.close(signal.SIGTERM, _TO_END)
                break
            if self._signals.stop_asked is not None:
                deadline = self._signals.stop_asked + self._options.shutdown_timeout
            for number in self._signals.take():
                for handler in self._ranks.subprocess_handlers.values():
                    if handler.proc.poll() is None:
                        os.kill(handler.proc.pid, number)
            if deadline and time.monotonic() > deadline:
                self._log(
                    f"Killing ranks that still run {self._options.shutdown_timeout:g} s "
                    "(--shutdown-timeout) after the request to stop; the last committed checkpoint "
                    "is kept."
                )
                self._overdue = {
                    rank for rank, code in self._return_codes().items() if code is None
                }
                self._ranks.close(signal.SIGKILL, _TO_DIE)
                break
            time.sleep(self._options.monitor_interval)

    def _return_codes(self) -> dict[int, int | None]:
        """Local rank to return code; None while it runs."""
        handlers = self._ranks.subprocess_handlers
        return {rank: handler.proc.poll() for rank, handler in handlers.items()}

    def _ended(self) -> dict[int, int]:
        """Local rank to exit code of those that ended with another code than 0."""
        return {rank: code for rank, code in self._return_codes().items() if code}

    # -- failing ------------------------------------------------------------------------------

    def _peers_are_gone(self) -> bool:
        """Whether ranks of other nodes failed so long ago that those here must have noticed, or
        another node is lost, which they may never notice."""
        self._look_at_others()
        if self._lost and not self._store_is_lost:
            return True
        failed_at = self._failed_elsewhere_at
        return failed_at is not None and time.monotonic() - failed_at > _TO_NOTICE

    def _look_at_others(self) -> None:
        """Once a second, shows other nodes that this agent is alive, and looks whether they are,
        and whether one has failed."""
        now = time.monotonic()
        if self._store_is_lost or now - self._checked <= _CHECK_OTHERS:
            return
        self._checked = now
        assert self._reports is not None
        try:
            self._reports.heartbeat()
            self._reports.watch(_TO_REPORT)
            if self._reports.somebody_failed():
                self._failed_elsewhere_at = self._failed_elsewhere_at or now
                if lost := self._reports.lost():
                    nodes = ", ".join(map(str, lost))
                    self._lost = f"Node {nodes} has sent no heartbeat for {_TO_REPORT:g} s"
        except RuntimeError:
            self._lose_store(store_lost(self._options))

    def _lose_store(self, why: str) -> None:
        """The node that keeps the store is gone or does not answer, or the state there is not of
        this run; ``why`` is a text without full stop."""
        end_connections(self._options.port)
        self._store_is_lost, self._lost = True, why
        self._failed_elsewhere_at = self._failed_elsewhere_at or time.monotonic()

    def _num_nodes_waiting(self) -> int:
        try:
            return 0 if self._store_is_lost else self._nodes_waiting()
        except RendezvousStateError as error:
            self._lose_store(first_line(error))
            return 0
        except RendezvousError:
            self._lose_store(store_lost(self._options))
            return 0

    def _decide(self, result: RunResult, ended: Collection[int]) -> None:
        """Decides, like all other nodes, what the failures mean and whether ranks are restarted."""
        failures = [self._failure(f, ended) for f in result.failures.values()]
        if not failures:
            failures = [self._stuck()]

        # A launcher may kill this agent while it waits for the reports of other nodes.
        self._write_termination(_outcome([self._own_report(failures)], []))

        def decisive(found: list[Report]) -> bool:
            return not _outcome(found, []).retry

        # After a request to stop ranks of other nodes may still save.
        is_stopping = self._signals.stop_asked is not None
        reports, lost = self._report(failures, decisive, while_alive=is_stopping)
        self.outcome = outcome = _outcome(reports, lost)
        restart = self._restart(outcome, reports)
        self._on_failure(outcome, reports[0].node == self._place[0])
        if restart:
            self._log(restart)
        else:
            self._remaining_restarts = 0
            self._finish(outcome)

    def _restart(self, outcome: Outcome, reports: list[Report]) -> str:
        """The log line if the ranks are restarted, else nothing. A node that leaves on request does
        not count as a restart."""
        leaving = [report.node for report in reports if report.leaving]
        finished = [report for report in reports if not report.failures]
        if self._signals.first or finished or not outcome.retry or self._store_is_lost:
            return ""
        if leaving:
            if self._place[1] - len(leaving) < self._options.min_nodes:
                return ""
            self._remaining_restarts += 1
            return (
                f"Continuing without node {', '.join(map(str, leaving))}, which was asked to stop."
            )
        if outcome.exit_code == Exit.PREEMPTED or self._remaining_restarts == 0:
            return ""
        most = self._worker_group.spec.max_restarts
        return f"Restarting the ranks (restart {most - self._remaining_restarts + 1} of {most})."

    def _exit_barrier(self) -> None:
        """Waits for the ranks of other nodes, which may still fail, as long as those nodes are
        alive. They need the store, so the node that keeps it waits even after a request to stop."""
        asked: float | None = None

        def enough(_: list[Report]) -> bool:
            nonlocal asked
            if self._signals.first is None:
                return False
            asked = asked or time.monotonic()
            longest = self._options.shutdown_timeout if self._keeps_store else 0.0
            return time.monotonic() - asked >= longest

        reports, lost = self._report([], enough, while_alive=True)
        if any(report.failures for report in reports):
            self.outcome = _outcome(reports, lost)
            self._on_failure(self.outcome, reports[0].node == self._place[0])
            self._finish(self.outcome)

    def _finish(self, outcome: Outcome) -> None:
        assert self._reports is not None
        self._reports.finish(keeps_store=self._keeps_store, lost=outcome.lost_nodes, due=self._due)

    def _report(
        self,
        failures: list[RankFailure],
        enough: Callable[[list[Report]], bool],
        *,
        while_alive: bool = False,
    ) -> tuple[list[Report], list[int]]:
        assert self._reports is not None
        own = self._own_report(failures)
        return self._reports.exchange(own, enough, self._due, while_alive=while_alive)

    def _own_report(self, failures: list[RankFailure]) -> Report:
        return Report(self._place[0], failures, leaving=self._signals.first is not None)

    def _due(self, silent_since: float) -> float:
        return deadlines.reports_due(
            silent_since, _TO_REPORT, self._signals.stop_asked, self._options.shutdown_timeout
        )

    def _write_termination(self, outcome: Outcome) -> None:
        if self._options.termination_log:
            with suppress(OSError):  # reported when the complete record is written
                write_termination(self._options.termination_log, outcome.record())

    def _failure(self, failure: ProcessFailure, ended: Collection[int]) -> RankFailure:
        local_rank = failure.local_rank
        # Before a rank handles a signal that was forwarded, it dies of it: it was stopped.
        was_stopped = -failure.exitcode in self._signals.forwarded - {signal.SIGINT}
        exit_code = Exit.PREEMPTED if was_stopped else shell_code(failure.exitcode)
        by_itself = local_rank in ended and local_rank not in self._ended_for_lost
        stopped = not by_itself and exit_code in _ENDS_OF_STOPPED
        has_file = Path(failure.error_file).is_file()
        error, left_at = error_of(failure.message) if has_file else ("", None)
        if stopped and self._lost:  # the cause, not how the rank ended because of it
            exit_code, error = Exit.RETRY, error or self._lost
        return RankFailure(
            rank=self._worker_group.workers[local_rank].global_rank,
            local_rank=local_rank,
            host=socket.gethostname(),
            pid=failure.pid,
            exit_code=exit_code,
            error=error,
            time=left_at or time.time(),
            log=tail(self._ranks.stderrs[local_rank] or os.devnull),
            stopped=stopped,  # a rank may have ended by itself after the last check
            overdue=local_rank in self._overdue and failure.exitcode == -signal.SIGKILL,
        )

    def _stuck(self) -> RankFailure:
        """Ranks that torch cannot kill, such as one that hangs in the kernel."""
        worker = self._worker_group.workers[0]
        text = "the ranks of this node cannot be killed: one may hang in the kernel"
        return RankFailure(
            worker.global_rank, worker.local_rank, socket.gethostname(), int(worker.id or 0),
            Exit.RETRY, text, time.time(), [],
        )  # fmt: skip

    @property
    def _ranks(self) -> SubprocessContext:
        assert isinstance(self._pcontext, SubprocessContext)
        return self._pcontext

    @property
    def _place(self) -> tuple[int, int]:
        """This node's number in the round, and the number of nodes."""
        group = self._worker_group
        return int(cast("Any", group.group_rank)), int(cast("Any", group.group_world_size))

    @property
    def _keeps_store(self) -> bool:
        if self._options.node_rank is not None:
            return self._options.node_rank == 0
        return self._place[0] == 0


def _outcome(reports: list[Report], lost: list[int]) -> Outcome:
    failures = [failure for report in reports for failure in report.failures]
    return Outcome.of(failures, lost, asked=any(report.leaving for report in reports))
