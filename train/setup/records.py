"""The records of an attempt that rank 0 opens: attempts.jsonl, the ledger, the mirror."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from train.checkpoint.mirror import Mirror
from train.checkpoint.mirroring import Mirroring
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.data.ledger import Ledger
from train.data.order import SampleOrder
from train.exits import RollbackError, SpikeError
from train.files import write_json
from train.process.stop import StopRequest
from train.secrets import redact, redact_values
from train.setup.facts import RECORDED
from train.setup.join import Joined
from train.strategies.base import Strategy


@dataclass(frozen=True)
class Records:
    """What rank 0 keeps records in."""

    ledger: Ledger
    mirroring: Mirroring | None
    """Copies committed checkpoints; None where the run has no mirror."""


def record_attempt(
    directory: RunDirectory,
    config: dict[str, Any],
    joined: Joined,
    strategy: Strategy,
    order: SampleOrder,
    micro_batch_size: int,
    facts: dict[str, Any],
) -> None:
    """Records this attempt and its config in the run directory. ``facts``: what it runs on, and in
    ``init_from`` what it loaded from there; None stands for nothing."""
    attempt = joined.attempt
    directory.clear_finished()
    for name, settings in strategy.run_directory_files().items():
        write_json(directory.path / name, settings)
    directory.record_attempt(
        {
            "attempt": attempt.number,
            "run": attempt.identity.id,
            "seed": order.seed,
            "samples": order.size,
            "batch": config["batch"]["global_batch_size"],
            "time": time.time(),
            "resumed_from_step": attempt.resume_step,
            "world_size": strategy.engine.world_size,
            "hosts": list(dict.fromkeys(joined.hosts)),
            "strategy": strategy.setup.name,
            "micro_batch_size": micro_batch_size,
            "device": strategy.engine.device.type,
            "code": joined.code,
            **{
                name: redact_values(facts[name])
                for name in (*RECORDED, "init_from")
                if facts[name] is not None
            },
            "changes": [redact(str(change)) for change in attempt.changes],
        }
    )
    if joined.changes:
        joined.changes.store()
    # Last, so that config.json is never that of an attempt which is not recorded.
    directory.store_config(config)


def open_records(
    stack: ExitStack,
    directory: RunDirectory,
    store: CheckpointStore,
    joined: Joined,
    order: SampleOrder,
    *,
    step: int,
    position: int,
    mirror: Mirror | None,
    mirror_wait: float,
    warn: Callable[[str], None],
    beat: Callable[[str], None],
) -> Records:
    """Opens the ledger, and starts copying checkpoints to the ``mirror``; both close with
    ``stack``. The attempt starts at ``step`` completed steps and ``position`` of the training
    stream. At the end of the run, copies get ``mirror_wait`` seconds."""
    mirroring = None
    if mirror:
        mirroring = Mirroring(
            mirror, store, joined.attempt.identity.id, warn, directory.ensure_in_place
        )
        stack.push(_closes(mirroring, mirror_wait, joined.stop, beat))
    ledger = Ledger(directory.ledger)
    stack.callback(ledger.close)
    ledger.begin_attempt(
        attempt=joined.attempt.number,
        resume_step=step,
        resume_position=position,
        order=order,
    )
    return Records(ledger, mirroring)


def _closes(
    mirroring: Mirroring, seconds: float, stop: StopRequest, beat: Callable[[str], None]
) -> Callable[..., None]:
    """Waits for what is not sent yet, but not after an error: copies that can wait must not delay
    the restart. At a spike the end is orderly, and the next attempt needs what was recorded."""

    def close(error: type[BaseException] | None, *_: object) -> None:
        is_orderly = error is None or issubclass(error, RollbackError | SpikeError)
        wait = min(seconds, stop.seconds_left - 1) if is_orderly else 0.0
        mirroring.close(wait, lambda: beat("waiting for the mirror"))

    return close
