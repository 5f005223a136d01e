"""torch's elastic agent, with judgement: what a failure means decides whether ranks start again."""

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

from launch.agent.endpoint import notice_silence
from launch.agent.failure import Failure, Verdict, error_of, first_failure, shell_code, tail
from launch.agent.options import Options
from launch.agent.reports import Report, Reports
from launch.agent.signals import Signals, StopSignal
from launch.contract import Exit

_LOOK_AT_OTHERS = 1.0  # seconds between two looks at what other nodes report
_TO_NOTICE = 5.0  # seconds for ranks to notice by themselves that others are gone, and say so
_TO_END = 10  # seconds for ranks to end when others have failed
_TO_REPORT = 25.0  # seconds for other nodes to report: longer than the two above
# How a rank ends that was asked to: it dies of it, is killed, has saved, or has lost its peers.
_ENDS_OF_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGKILL, Exit.PREEMPTED, Exit.RETRY)


class NodeAgent(LocalElasticAgent):
    """The ranks of one node. Until ``run`` returns, signals belong to it."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        options: Options,
        signals: Signals,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(
            spec,
            logs_specs,
            log_line_prefix_template=f"[{socket.gethostname()}:${{rank}}] ",
            shutdown_timeout=int(options.shutdown_timeout),
        )
        self.verdict: Verdict | None = None
        """What became of the ranks; None while they run, and if all ended well."""
        self.judged: Callable[[Verdict, int], None] = lambda verdict, node: None
        """Called with each verdict, and the number of the node that is to write it down."""
        self._options, self._signals, self._tell = options, signals, tell
        self._reports: Reports | None = None
        self._looked = 0.0
        self._failed_elsewhere_at: float | None = None

    # -- the steps of torch's loop that are done otherwise ------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._signals.interruptible = True  # first, so that no signal is overlooked in between
        if self._signals.first:
            raise StopSignal(self._signals.first)
        super()._rendezvous(worker_group)
        self._signals.interruptible = False
        self.verdict, self._failed_elsewhere_at = None, None
        notice_silence(self._options.port)
        node, nodes = self._place
        self._reports = Reports(cast("Any", worker_group.store), node, nodes)
        if nodes > 1:
            ranks = [worker.global_rank for worker in worker_group.workers]
            self._tell(
                f"{socket.gethostname()} is node {node} of {nodes} and has the ranks {ranks[0]} to "
                f"{ranks[-1]} of {worker_group.workers[0].world_size}."
            )

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # torch would take over our handlers while it starts the ranks, and a signal then would end
        # the agent with an error; tied.py takes the variable out of the ranks' environment.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"
        return cast("dict[int, Any]", super()._start_workers(worker_group))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._signals.first:
            self._pass_on_signals()
        ended = self._ended()
        if ended and set(ended.values()) == {Exit.PREEMPTED}:
            # They have agreed to stop; the others may still have to copy what was saved.
            self._pass_on_signals(time.monotonic() + self._options.shutdown_timeout)
        elif ended:
            # The others are of no use any more; torch would give them longer than other nodes wait.
            self._ranks.close(signal.SIGTERM, _TO_END)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self._peers_are_gone():
            ended = self._ended()
            self._ranks.close(signal.SIGTERM, _TO_END)
            result = super()._monitor_workers(worker_group)
        if result.state not in (WorkerState.HEALTHY, WorkerState.SUCCEEDED):
            self._judge(result, ended)
        return result

    # -- stopping -----------------------------------------------------------------------------

    def _pass_on_signals(self, deadline: float | None = None) -> None:
        """Tells the ranks, and waits for them to end: a stop reaches all nodes through the ranks,
        which agree on it. After a SIGTERM they have ``shutdown_timeout`` seconds."""
        while None in self._return_codes().values():
            self._live()
            for number in self._signals.take():
                if number == signal.SIGTERM:
                    deadline = time.monotonic() + self._options.shutdown_timeout
                for handler in self._ranks.subprocess_handlers.values():
                    if handler.proc.poll() is None:
                        os.kill(handler.proc.pid, number)
            if deadline and time.monotonic() > deadline:
                self._tell(
                    f"Ranks were still there --shutdown-timeout, {self._options.shutdown_timeout:g}"
                    " s, after the request to stop, and are killed now; the last committed "
                    "checkpoint stands."
                )
                self._ranks.close(signal.SIGKILL, _TO_END)
                break
            time.sleep(self._options.monitor_interval)

    def _return_codes(self) -> dict[int, int | None]:
        """Local rank to return code; None while it runs."""
        handlers = self._ranks.subprocess_handlers
        return {rank: handler.proc.poll() for rank, handler in handlers.items()}

    def _ended(self) -> dict[int, int]:
        """Those that ended badly, and how."""
        return {rank: code for rank, code in self._return_codes().items() if code}

    # -- failing ------------------------------------------------------------------------------

    def _peers_are_gone(self) -> bool:
        """Whether ranks elsewhere have failed, and those here have had time to notice."""
        now = time.monotonic()
        if self._failed_elsewhere_at is not None:
            return now - self._failed_elsewhere_at > _TO_NOTICE
        if now - self._looked > _LOOK_AT_OTHERS:
            self._looked = now
            assert self._reports is not None
            try:
                failed = self._reports.somebody_failed()
                self._reports.beat()
            except RuntimeError:
                failed = True  # the store is gone with its node
            self._failed_elsewhere_at = now if failed else None
        return False

    def _live(self) -> None:
        """A sign of life while this agent does something else."""
        assert self._reports is not None
        with suppress(RuntimeError):  # noticed elsewhere
            self._reports.beat()

    def _judge(self, result: RunResult, ended: Collection[int]) -> None:
        """Decides, as all other nodes do, what the failures mean, and whether ranks start again."""
        failures = [self._failure(f, ended) for f in result.failures.values()]
        if not failures:
            failures = [self._stuck()]

        def decisive(found: list[Report]) -> bool:
            return not self._verdict(found, []).retry

        reports, lost = self._report(failures, decisive, _TO_REPORT)
        self.verdict = verdict = self._verdict(reports, lost)
        go_on = self._go_on(reports)
        self.judged(verdict, reports[0].node)
        if go_on:
            self._tell(go_on)
        else:
            self._remaining_restarts = 0
            self._part(verdict)

    def _go_on(self, reports: list[Report]) -> str:
        """In words, if the ranks start again; else nothing. A node that leaves costs no restart."""
        assert self.verdict is not None
        leaving = [report.node for report in reports if report.leaving]
        finished = [report for report in reports if not report.failures]
        if self._signals.first or finished or not self.verdict.retry:
            return ""
        if leaving:
            if self._place[1] - len(leaving) < self._options.min_nodes:
                return ""
            self._remaining_restarts += 1
            return f"Going on without node {', '.join(map(str, leaving))}, which was asked to stop."
        if self.verdict.exit_code == Exit.PREEMPTED or self._remaining_restarts == 0:
            return ""
        most = self._worker_group.spec.max_restarts
        return (
            f"Starting the ranks again (restart {most - self._remaining_restarts + 1} of {most})."
        )

    def _exit_barrier(self) -> None:
        """The ranks here ended well; those of other nodes may still end otherwise. As long as they
        live they are waited for, above all by the node that keeps the store, which they need."""
        asked: float | None = None

        def enough(_: list[Report]) -> bool:
            nonlocal asked
            if self._signals.first is None:
                return False
            asked = asked or time.monotonic()
            patience = self._options.shutdown_timeout if self._keeps_store else 0.0
            return time.monotonic() - asked >= patience

        reports, lost = self._report([], enough, _TO_REPORT, while_alive=True)
        if any(report.failures for report in reports):
            self.verdict = self._verdict(reports, lost)
            self.judged(self.verdict, reports[0].node)
            self._part(self.verdict)

    def _part(self, verdict: Verdict) -> None:
        assert self._reports is not None
        self._reports.part(
            keeps_store=self._keeps_store, lost=verdict.lost_nodes, patience=_TO_REPORT
        )

    def _report(
        self,
        failures: list[Failure],
        enough: Callable[[list[Report]], bool],
        patience: float,
        *,
        while_alive: bool = False,
    ) -> tuple[list[Report], list[int]]:
        assert self._reports is not None
        own = Report(self._place[0], failures, leaving=self._signals.first is not None)
        return self._reports.exchange(own, enough, patience, while_alive=while_alive)

    def _verdict(self, reports: list[Report], lost: list[int]) -> Verdict:
        failures = [failure for report in reports for failure in report.failures]
        return Verdict(first_failure(failures), failures, lost)

    def _failure(self, failure: ProcessFailure, ended: Collection[int]) -> Failure:
        local_rank = failure.local_rank
        told = Path(failure.error_file).is_file()
        error, left_at = error_of(failure.message) if told else ("", None)
        return Failure(
            rank=self._worker_group.workers[local_rank].global_rank,
            local_rank=local_rank,
            host=socket.gethostname(),
            pid=failure.pid,
            exit_code=shell_code(failure.exitcode),
            error=error,
            time=left_at or time.time(),
            log=tail(self._ranks.stderrs[local_rank] or os.devnull),
            # One may have ended by itself after it was last looked at.
            stopped=local_rank not in ended and shell_code(failure.exitcode) in _ENDS_OF_STOPPED,
        )

    def _stuck(self) -> Failure:
        """Ranks that torch gave up on, such as one that hangs in the kernel."""
        worker = self._worker_group.workers[0]
        text = "the ranks of this node cannot be watched any more: one hangs in the kernel, say"
        return Failure(
            worker.global_rank, worker.local_rank, socket.gethostname(), int(worker.id or 0),
            Exit.RETRY, text, time.time(), [],
        )  # fmt: skip

    @property
    def _ranks(self) -> SubprocessContext:
        assert isinstance(self._pcontext, SubprocessContext)
        return self._pcontext

    @property
    def _place(self) -> tuple[int, int]:
        """This node's number in the round, and how many nodes there are."""
        group = self._worker_group
        return int(cast("Any", group.group_rank)), int(cast("Any", group.group_world_size))

    @property
    def _keeps_store(self) -> bool:
        if self._options.node_rank is not None:
            return self._options.node_rank == 0
        return self._place[0] == 0
