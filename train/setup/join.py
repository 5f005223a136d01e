"""The start of an attempt: the ranks join, agree on the run, and find its directory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from train.checkpoint.run_directory import RunDirectory
from train.code.collect import CodeRecord
from train.code.version import code_version
from train.config.changes import Difference
from train.config.load import LoadedConfig
from train.distributed.world import this_world
from train.goodput.ledger import GoodputLedger
from train.process.stacks import StackRequests
from train.process.stop import StopRequest
from train.process.watchdog import Heartbeat, StartTimeout, Watchdog
from train.setup.agreement import check_same_run, check_shared_directory
from train.setup.build import StrategyChoice, build_engine, choose_strategy
from train.setup.find_run import Attempt, find_run
from train.strategies.engine import Engine
from train.track.logs import setup_logging


@dataclass(frozen=True)
class Joined:
    """What each rank knows once all ranks have joined."""

    stop: StopRequest
    heartbeat: Heartbeat
    choice: StrategyChoice
    engine: Engine
    hosts: list[str]
    """The host of each rank."""
    code: dict[str, Any]
    """Versions and commit."""
    changes: CodeRecord | None
    """Collects what differs from the commit; None on ranks other than 0, or if it is not wanted."""
    attempt: Attempt
    goodput: GoodputLedger
    """Where the time goes; only rank 0 writes it."""


def join_ranks(
    stack: ExitStack,
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    stop: StopRequest,
    goodput: GoodputLedger,
    *,
    allow_changes: bool,
) -> Joined:
    """Joins the other ranks and finds the run; collective. What is opened closes with ``stack``,
    but for ``goodput``.

    From here on signals request a stop, the watchdog watches this rank, and its log file is open.
    """
    config, clock = loaded.config, goodput.clock
    stack.enter_context(stop)
    stacks = stack.enter_context(StackRequests(this_world().rank, directory.path))
    choice = choose_strategy(loaded)
    with StartTimeout(config.watchdog):
        engine = build_engine(config, choice, clock.within("rendezvous"))
        stack.push(engine.leave)
        stop.ranks_joined()
        code = code_version()
        with clock.within("rendezvous"):
            hosts = check_same_run(engine.collectives, config, code)
        with clock.within("restore"):
            attempt = find_run(
                engine.collectives, loaded, directory, changes, allow_changes=allow_changes
            )
        changes_of_code = None
        if engine.is_main:
            goodput.open(directory.path, attempt.number, attempt.resume_step or 0)
            if limit := config.track.code_diff_kb:
                changes_of_code = CodeRecord(directory.path, attempt.number, limit)
                stack.callback(changes_of_code.close)
        setup_logging(directory.path, engine.rank, attempt.number, config.track.log_level)
        check_shared_directory(engine.collectives, directory.path, loaded.run_directory_as_set)
    watchdog = stack.enter_context(
        Watchdog(
            config.watchdog,
            directory.path,
            engine.rank,
            engine.world_size,
            attempt.number,
            stop.abrupt_end,
        )
    )
    stacks.heartbeat = watchdog.heartbeat
    return Joined(
        stop, watchdog.heartbeat, choice, engine, hosts, code, changes_of_code, attempt, goodput
    )
