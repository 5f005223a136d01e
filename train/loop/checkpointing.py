"""What a run commits: a checkpoint, and before it the ledger and the metrics of its steps."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.mirroring import Mirroring
from train.checkpoint.saver import CheckpointSaver, SaveRequest
from train.checkpoint.store import CheckpointStore
from train.data.fetch import MicroBatch
from train.data.ledger import Ledger, LeftOut, Skip, StepRecord, goes_on_at
from train.exits import RetryError, RunError
from train.loop.early_stop import EarlyStop
from train.loop.state import Progress
from train.loop.step_metrics import StepMetrics
from train.optim.ema import Ema
from train.optim.spikes import SpikeGuard
from train.setup.resume import saved_state
from train.strategies.base import Strategy
from train.track.tracker import Tracker

_log = logging.getLogger("train")


class Checkpointing:
    """Writes the checkpoints of one attempt, and reports writes that failed.

    All methods are collective, unless they say otherwise. ``ledger`` is rank 0's, None on other
    ranks. ``facts`` are JSON values that each checkpoint keeps: ``run``, ``attempt``,
    ``samples`` and others. ``ensure_in_place`` raises RetryError on rank 0 once the run directory
    was moved. ``last_step`` is the step of the checkpoint that the attempt resumed from, and
    ``mirroring`` copies committed checkpoints (rank 0's; None without a mirror).
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        strategy: Strategy,
        ema: Ema | None,
        *,
        tracker: Tracker,
        ledger: Ledger | None,
        facts: Mapping[str, Any],
        last_step: int | None,
        ensure_in_place: Callable[[], None],
        mirroring: Mirroring | None = None,
    ) -> None:
        self._store, self._on_error = store, config.on_error
        self._strategy, self._ema, self._tracker = strategy, ema, tracker
        self._ledger, self._facts = ledger, dict(facts)
        self._collectives = strategy.engine.checkpoint_collectives
        self._saver = CheckpointSaver(
            store,
            config,
            self._collectives,
            last_step=last_step,
            on_commit=self._announce,
            ensure_in_place=ensure_in_place,
        )
        self._logged_timing = self._saver.last_timing
        self._pending: list[StepRecord] = []
        self.started_step = last_step
        """The step of the newest checkpoint, which may not be committed yet."""
        self._mirroring, self._ensure_in_place = mirroring, ensure_in_place
        self._last_error: str | None = None

    @property
    def last_step(self) -> int | None:
        """The step of the newest committed checkpoint. Not collective."""
        return self._saver.last_step

    @property
    def last_step_on_disk(self) -> int | None:
        """The step of the newest committed checkpoint, read now: this rank may not know yet that
        another one has committed it. Not collective."""
        try:
            return max(self._store.steps(), default=None)
        except OSError:
            return self.last_step

    @property
    def last_path(self) -> Path | None:
        """The newest committed checkpoint. Not collective."""
        return None if self.last_step is None else self._store.path(self.last_step)

    @property
    def written(self) -> bool:
        """Whether the checkpoint in flight is committed, as far as this rank knows, and ``wait``
        was not called since. Not collective."""
        return self._saver.written

    @property
    def failed(self) -> bool:
        """Whether a write has failed on this rank and was not reported yet. Not collective."""
        return self._saver.failed

    @property
    def lacks_space(self) -> bool:
        """Whether the last write failed because the disk is full. Not collective."""
        full = (errno.ENOSPC, errno.EDQUOT)
        return any(os.strerror(number) in (self._last_error or "") for number in full)

    def error(self, what: str, remedy: str) -> RunError:
        """The error that ends the run because the last write failed. ``what`` is its start, and
        ``remedy`` is for a failure that a retry may solve. Not collective."""
        if self._saver.may_retry:
            return RetryError(f"{what}; {remedy} ({self._last_error}).")
        return RunError(f"{what} ({self._last_error}); correct the code, then rerun.")

    def record(self, step: int, position: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Records the samples of step ``step``, which starts at ``position`` of the training
        stream, for the ledger. Not collective: each rank records its own micro-batches."""
        samples = sum(len(micro.positions) for micro in micro_batches)
        digest = sum(micro.digest for micro in micro_batches) % 2**64
        self._pending.append(StepRecord(step, position, samples, digest))

    def record_skip(self, step: int, why: Skip) -> None:
        """Records that a step which is not in the ledger yet has not changed the weights. Not
        collective."""
        self._pending = [replace(r, skip=why) if r.step == step else r for r in self._pending]

    def leave_out(self, step: int, position: int) -> tuple[LeftOut, int] | None:
        """Records that the run goes back to its newest checkpoint from a spike at ``step``, and
        goes on with ``position`` of the training stream. Returns what is left out and how often
        the run has gone back there; None where there is no checkpoint. Call ``wait`` before."""
        if self.last_step is None:
            return None
        recorded: tuple[int, ...] = ()
        if self._ledger is not None:
            self._ensure_in_place()
            saved = Manifest.read(self._store.path(self.last_step)).state["progress"]["position"]
            start, before = goes_on_at(self._ledger.path, self.last_step, saved)
            part = LeftOut(self.last_step, start, position - start, step)
            self._ledger.leave_out(part)
            if self._mirroring:  # another directory, too, must leave them out
                self._mirroring.amended(self.last_step)
            recorded = start, before + 1
        start, times = self._strategy.collectives.broadcast_object(recorded)
        return LeftOut(self.last_step, start, position - start, step), times

    def reserve(self) -> None:
        """Allocates the host memory of the first checkpoint. Called after the first step, when
        the optimiser has its state."""
        self._saver.reserve(saved_state(self._strategy, self._ema)[0])

    def start(
        self,
        progress: Progress,
        metrics: StepMetrics,
        early_stop: EarlyStop | None,
        spikes: SpikeGuard | None,
    ) -> bool:
        """Starts a checkpoint of the present step, after ``wait``. Returns False where there is
        one already."""
        if self.last_step == progress.step:
            return False
        strategy = self._strategy
        strategy.sync_buffers()
        self._check_records()
        tensors, values = saved_state(strategy, self._ema)
        state = {
            **self._facts,
            **_evaluation_state(progress, early_stop),
            "window": metrics.state_dict(),
            "spikes": spikes.state_dict() if spikes else None,
            **values,
        }
        evaluated_now = progress.evaluated_step == progress.step
        request = SaveRequest(
            step=progress.step,
            state=state,
            metrics=dict(progress.evaluated) if evaluated_now else None,
            before_commit=self._write_records(list(self._pending), progress.step),
        )
        self.started_step = progress.step
        with metrics.timed("checkpoint"):
            self._report(self._saver.save(tensors, request))
        return True

    def amend(self, progress: Progress, early_stop: EarlyStop | None) -> None:
        """Adds an evaluation to the committed checkpoint of the present step, where there is one.
        Not collective: rank 0 does it."""
        if self.last_step != progress.step or progress.evaluation_due or self._collectives.rank:
            return
        self._ensure_in_place()
        try:
            state = _evaluation_state(progress, early_stop)
            self._store.amend(progress.step, state, dict(progress.evaluated))
            self._store.prune(self._saver.config)
        except (OSError, DamagedError) as error:
            self._tracker.warn(
                f"The evaluation of step {progress.step} could not be added to its checkpoint "
                f"({error})."
            )
        if self._mirroring:
            self._mirroring.amended(progress.step)
        self._tracker.committed(progress.step)

    def _announce(self) -> None:
        """Called on rank 0, in the writing thread, after a commit."""
        if self._mirroring:
            self._mirroring.committed()
        self._tracker.committed(self.started_step or 0)

    def wait(self) -> None:
        """Returns when the checkpoint in flight is committed or has failed."""
        self._report(self._saver.wait())

    def close(self) -> None:
        """At the end of the process: waits for the checkpoint in flight, without a report."""
        self._saver.close()

    def _report(self, error: str | None) -> None:
        """Reports a failed write; it ends the run only with checkpoint.on_error=stop."""
        if error is None:
            self._log_timing()
            return
        self._last_error = error
        text = (
            f"A checkpoint could not be written ({error}); the earlier ones in "
            f"{self._store.directory} are unchanged."
        )
        if self._on_error == "stop":
            kind = RetryError if self._saver.may_retry else RunError
            raise kind(f"{text} The run ends because checkpoint.on_error is stop.")
        self._tracker.warn(f"{text} Training continues and tries again at the next checkpoint.")

    def _log_timing(self) -> None:
        """Logs how long the newest checkpoint took, once."""
        step, timing = self.last_step, self._saver.last_timing
        if timing is not self._logged_timing:
            self._logged_timing = timing
            _log.info(
                "checkpoint of step %d: written, hashed and committed in %.3f s; training waited "
                "%.3f s for the copy and %.3f s for the write",
                *(step, timing.write, timing.copy, timing.wait),
            )

    def _write_records(self, records: list[StepRecord], step: int) -> Callable[[], None]:
        """What the writing thread calls before it commits: the ledger and the metrics of all
        steps up to the checkpoint become durable first."""

        def before_commit() -> None:
            sums = self._collectives.all_reduce_ints(
                [*(r.count for r in records), *(_signed(r.digest) for r in records)]
            )
            if self._ledger is not None:
                counts, digests = sums[: len(records)], sums[len(records) :]
                self._ledger.append_steps(
                    [
                        replace(r, count=count, digest=digest % 2**64)
                        for r, count, digest in zip(records, counts, digests, strict=True)
                    ]
                )
                self._tracker.flush(step)
                self._ensure_in_place()

        return before_commit

    def _check_records(self) -> None:
        """Drops the records that are in the ledger; after a failed write it may lack some. Raises
        RetryError on all ranks if the run directory was moved."""
        recorded: int | None = None
        moved = ""
        if self._ledger is not None:
            try:
                self._ensure_in_place()
                recorded = self._ledger.last_step
            except RetryError as error:
                moved = str(error)
        recorded, moved = self._strategy.collectives.broadcast_object((recorded, moved))
        if moved:
            raise RetryError(moved)
        self._pending = [r for r in self._pending if recorded is None or r.step > recorded]


def _evaluation_state(progress: Progress, early_stop: EarlyStop | None) -> dict[str, Any]:
    return {
        "progress": progress.state_dict(),
        "early_stop": early_stop.state_dict() if early_stop else None,
    }


def _signed(value: int) -> int:
    """A 64-bit digest as the signed integer with the same bits."""
    return value - 2**64 if value >= 2**63 else value
