"""What a run commits: the checkpoint, and before it the ledger and the metrics of its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from train.checkpoint.saver import CheckpointSaver, SaveRequest
from train.checkpoint.state import collect_state
from train.checkpoint.store import CheckpointStore, DamagedError
from train.data.ledger import Ledger, StepRecord
from train.exits import RetryError
from train.optim.optimizer import param_group_values

if TYPE_CHECKING:
    from train.loop.run import Run

_log = logging.getLogger("train")


class Saving:
    """Saves a run, and tells it of writes that failed. All methods are collective."""

    def __init__(self, run: Run, store: CheckpointStore) -> None:
        self.run = run
        self._saver = CheckpointSaver(store, run.config.checkpoint, run.engine.checkpoint_group)
        self._logged_timing = self._saver.last_timing
        self._pending: list[StepRecord] = []
        self.ledger: Ledger | None = None
        """Rank 0's alone; opened when the attempt begins."""

    @property
    def last_step(self) -> int | None:
        """The step of the newest committed checkpoint."""
        return self._saver.last_step

    @last_step.setter
    def last_step(self, step: int) -> None:
        self._saver.last_step = step

    def committed(self, call: Callable[[], None]) -> None:
        """``call`` is called, on rank 0, after each commit."""
        self._saver.committed = call

    @property
    def failed(self) -> bool:
        """Whether a write has failed on this rank and nobody was told yet."""
        return self._saver.failed

    def record(self, step: StepRecord) -> None:
        """Takes in this rank's part of a step's entry in the ledger."""
        self._pending.append(step)

    def reserve(self) -> None:
        """Prepares the memory of the first checkpoint; after the first step, when the optimiser
        has its state."""
        self._saver.reserve(collect_state(self.run.engine.strategy, self.run.ema)[0])

    def start(self) -> None:
        """Starts a checkpoint of the present step, unless there is one already."""
        run, progress = self.run, self.run.progress
        self._report(self._saver.wait())
        if self.last_step == progress.step:
            return
        run.engine.strategy.sync_buffers()
        self._drop_recorded()
        shards, optimizer_values = collect_state(run.engine.strategy, run.ema)
        loss_scale = run.engine.loss_scale
        state = {
            "run": run.identity.id,
            "attempt": run.attempt,
            "samples": run.order.size,
            "progress": vars(progress).copy(),
            "window": run.window.state_dict(),
            "early_stop": run.early_stop.state_dict() if run.early_stop else None,
            "loss_scale": loss_scale.state_dict() if loss_scale else None,
            "optimizer": optimizer_values,
            "optimizer_groups": param_group_values(run.engine.optimizer),
        }
        evaluated_now = run.due.evaluated_step == progress.step
        request = SaveRequest(
            step=progress.step,
            state=state,
            metrics=dict(progress.evaluated) if evaluated_now else None,
            before_commit=self._make_durable(list(self._pending), progress.step),
        )
        started = time.perf_counter()
        self._report(self._saver.save(shards, request))
        run.window.checkpoint_seconds += time.perf_counter() - started
        run.due.saved()

    def amend(self) -> None:
        """Adds an evaluation that was made up for to the checkpoint of its step."""
        run, progress = self.run, self.run.progress
        if self.last_step != progress.step or progress.evaluation_due or not run.engine.is_main:
            return
        state = {
            "progress": vars(progress).copy(),
            "early_stop": run.early_stop.state_dict() if run.early_stop else None,
        }
        try:
            self._saver.store.amend(progress.step, state, dict(progress.evaluated))
        except (OSError, DamagedError) as error:
            run.tracker.warn(f"The evaluation of step {progress.step} was not kept ({error}).")

    def wait(self) -> None:
        """Returns when the checkpoint in flight is committed or has failed."""
        self._report(self._saver.wait())

    def abandon(self) -> None:
        """At the end of the process: waits for the write in flight, whatever becomes of it."""
        self._saver.wait()

    def _report(self, error: str | None) -> None:
        """A failed write is told, and ends the run only if the config says so."""
        if error is None:
            self._log_timing()
            return
        text = (
            f"A checkpoint could not be written ({error}); the earlier ones in "
            f"{self.run.directory.checkpoints} are untouched."
        )
        if self.run.config.checkpoint.on_error == "stop":
            raise RetryError(f"{text} The run ends because checkpoint.on_error is stop.")
        self.run.tracker.warn(f"{text} Training goes on and tries again at the next one.")

    def _log_timing(self) -> None:
        """How long the newest checkpoint took, in the log file, once."""
        step, timing = self.last_step, self._saver.last_timing
        if timing is not self._logged_timing:
            self._logged_timing = timing
            _log.info(
                "checkpoint of step %d: training stood still %.3f s for the copy and %.3f s for "
                "the one before; written, hashed and committed in %.3f s",
                *(step, timing.copy, timing.wait, timing.write),
            )

    def _make_durable(self, records: list[StepRecord], step: int) -> Callable[[], None]:
        """What must be on disk before the checkpoint is: the ledger and the metrics."""

        def before_commit() -> None:
            import torch
            import torch.distributed as dist

            group = self.run.engine.checkpoint_group
            sums = torch.tensor(
                [[r.count for r in records], [_signed(r.digest) for r in records]],
                dtype=torch.int64,
            )
            if group:
                dist.all_reduce(sums, group=group)
            if self.ledger is not None:
                counts, digests = sums.tolist()
                self.ledger.append_steps(
                    [
                        StepRecord(r.step, r.start_position, count, digest % 2**64)
                        for r, count, digest in zip(records, counts, digests, strict=True)
                    ]
                )
                self.run.tracker.flush(step)

        return before_commit

    def _drop_recorded(self) -> None:
        """Forgets the steps that the ledger has; after a failed write it may lack some."""
        recorded = self.run.engine.broadcast(self.ledger.last_step if self.ledger else None)
        self._pending = [r for r in self._pending if recorded is None or r.step > recorded]


def _signed(value: int) -> int:
    """A 64-bit digest as the signed integer with the same bits."""
    return value - 2**64 if value >= 2**63 else value
