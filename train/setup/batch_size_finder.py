"""Finds the largest micro-batch that fits into memory, by trying before the first step.

What fits depends on the model, the strategy and the device, and is not known before. So steps are
taken with one micro-batch for a rank's whole share of the batch, then with two, four ... until the
memory suffices; then the interval in between is bisected. Each trial has a model of its own, which
is dropped, so that an operation that ran out of memory leaves nothing in the run. The results
are kept in the run directory: a run that is started again tries nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.config.schema import Config
from train.data.plan import BatchConfig, BatchPlan
from train.distributed.collectives import Collectives
from train.distributed.process_group import collectives_called, end_group
from train.exits import OutOfMemoryError, RetryError, first_line
from train.files import write_json
from train.json_files import read_object
from train.process.diagnose import is_out_of_memory
from train.setup.build import TrainableModel
from train.setup.trial_step import Trial, free_device_memory
from train.strategies.engine import Engine
from train.tasks.base import Task

_log = logging.getLogger("train")
FILE = "micro_batches.json"
NOTHING_FITS = (
    "Out of memory with one sample per rank and micro-batch; set activation_checkpointing=true, or "
    "shard the model over more ranks with strategy=fsdp2."
)
_RESULTS = ("begun", "fits", "too large")
# Ranks may wait in an exchange for a rank that ran out of memory.
_TRIAL_TIMEOUT = timedelta(minutes=5)
# A rank that ran out of memory waits for the others this many times as long as it has taken itself.
_PATIENCE, _LEAST_PATIENCE = 4, timedelta(seconds=30)


def is_wanted(batch: BatchConfig, device: torch.device) -> bool:
    """Whether the config leaves the size open, on a device that reports when its memory is full."""
    on_gpu = device.type == "cuda"
    return batch.micro_batch_size == "auto" and (on_gpu if batch.try_out is None else batch.try_out)


class BatchSizeFinder:
    """Tries plans, and keeps the results in ``directory``; all ranks call the same methods.

    ``build`` builds a fresh model for a plan, ``data`` is the training data, ``beat`` tells the
    watchdog what this rank does.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        data: Any,
        engine: Engine,
        strategy_name: str,
        *,
        build: Callable[[BatchPlan], TrainableModel],
        directory: Path,
        beat: Callable[[str], None],
    ) -> None:
        self._config, self._task, self._data, self._engine = config, task, data, engine
        self._build, self._beat = build, beat
        self._path = directory / FILE
        self._kept: dict[str, Any] = engine.collectives.broadcast_object(self._read())
        self._results: dict[str, Any] = self._kept.setdefault(self._key(strategy_name), {})

    def find(self) -> BatchPlan:
        """The plan with the fewest micro-batches per step that fit; the same on all ranks.

        Raises OutOfMemoryError where even micro-batches of one sample do not fit.
        """
        batch, ranks = self._config.batch.global_batch_size, self._engine.world_size
        most = max(batch // ranks, 1)  # micro-batches per rank, so that none is empty
        failed, fits = 0, 1
        while not self._fits(fits):
            if fits == most:
                raise OutOfMemoryError(NOTHING_FITS)
            failed, fits = fits, min(2 * fits, most)
        while fits - failed > 1:
            middle = (failed + fits) // 2
            failed, fits = (failed, middle) if self._fits(middle) else (middle, fits)
        return self._plan(fits)

    def _plan(self, accumulation: int) -> BatchPlan:
        """The plan with ``accumulation`` micro-batches per rank and step."""
        batch, ranks = self._config.batch.global_batch_size, self._engine.world_size
        return BatchPlan(batch, -(-batch // (ranks * accumulation)), ranks)

    def plans(self) -> list[BatchPlan]:
        """Plans from the smallest micro-batches to the largest, each about twice as large as those
        before it; the same on all ranks."""
        most = max(self._config.batch.global_batch_size // self._engine.world_size, 1)
        numbers = {most, *(2**power for power in range(most.bit_length()))}
        plans = {(plan := self._plan(n)).largest_micro_batch: plan for n in numbers}
        return [plans[size] for size in sorted(plans)]

    def between(self, fits: BatchPlan, too_large: BatchPlan) -> BatchPlan | None:
        """A plan with micro-batches of a size between those of two others, if there is one."""
        middle = self._plan((fits.accumulation + too_large.accumulation) // 2)
        known = (fits.largest_micro_batch, too_large.largest_micro_batch)
        return None if middle.largest_micro_batch in known else middle

    def _fits(self, accumulation: int) -> bool:
        """Whether ``accumulation`` micro-batches per step fit, on all ranks."""
        plan = self._plan(accumulation)
        size = str(plan.largest_micro_batch)
        if self._results.get(size) == "begun":
            # The kernel may have ended the process, or only one rank was out of memory.
            _log.warning(
                "the trial of micro-batches of %s samples did not end the last time, so they count "
                "as too large; remove %s to try again",
                *(size, self._path),
            )
            self._keep(size, "too large")
        elif size not in self._results:
            self._keep(size, "begun")
            self._keep(size, "fits" if self.try_out(plan) else "too large")
        return bool(self._results[size] == "fits")

    def try_out(self, plan: BatchPlan, measure: Callable[[Trial], None] | None = None) -> bool:
        """Whether steps of a plan fit, on all ranks; where they do, ``measure`` gets the trial,
        which has taken its first steps. What it does must fit, too."""
        size = plan.largest_micro_batch
        self._beat(f"trying micro-batches of {size}")
        group = dist.new_group(backend="gloo", timeout=_TRIAL_TIMEOUT) if self._ranks > 1 else None
        among_ranks = Collectives(self._engine.rank, self._ranks, group)
        trial = Trial(self._config, self._task, self._data, lambda: self._build(plan), plan)
        # First without an exchange, where the strategy allows it: ranks must not wait for one that
        # is out of memory.
        parts: list[Callable[[], None]] = [trial.alone, trial.together]
        if measure:
            parts.append(partial(measure, trial))
        fits = all(self._all_fit(among_ranks, part, size) for part in parts)
        if not fits:
            self._check_in_step(among_ranks, size)
        del trial, parts
        self._engine.free_memory()
        free_device_memory(self._engine.device)
        if group is not None:
            end_group(group)
        return fits

    @property
    def _ranks(self) -> int:
        return self._engine.world_size

    def _all_fit(self, among_ranks: Collectives, part: Callable[[], None], size: int) -> bool:
        out_of_memory, started = False, time.monotonic()
        try:
            part()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
            _log.info("micro-batches of %d do not fit on this rank: %s", size, first_line(error))
            if among_ranks.host_group is not None:
                taken = timedelta(seconds=time.monotonic() - started)
                dist.distributed_c10d._set_pg_timeout(
                    min(max(_PATIENCE * taken, _LEAST_PATIENCE), _TRIAL_TIMEOUT),
                    among_ranks.host_group,
                )
        try:
            return among_ranks.all_reduce_ints([out_of_memory]) == [0]
        except RuntimeError as error:
            raise RetryError(
                f"Micro-batches of {size} samples fit into the memory of some ranks only, which "
                "wait for the others; rerun to try smaller ones."
            ) from error

    def _check_in_step(self, among_ranks: Collectives, size: int) -> None:
        """Ends the attempt where ranks ran out of memory at different collectives: they would take
        the collectives of the next trial for those that are missing. A new start has new process
        groups, and tries smaller sizes."""
        if self._ranks == 1:
            return
        called = among_ranks.all_gather_object(collectives_called())
        if any(numbers != called[0] for numbers in called):
            self._keep(str(size), "too large")
            raise RetryError(
                f"Micro-batches of {size} samples do not fit into memory, and ranks noticed it at "
                "different collectives; rerun to try smaller ones."
            )

    def _key(self, strategy_name: str) -> str:
        """What the result depends on, besides the code."""
        config, device = self._config, self._engine.device
        memory = 0
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        facts = [
            strategy_name, f"x{self._ranks}", config.precision,
            f"batch {config.batch.global_batch_size}", f"{device.type} {memory >> 30} GiB",
        ]  # fmt: skip
        options = {"compiled": config.compile, "checkpointing": config.activation_checkpointing}
        return ", ".join([*facts, *(name for name, on in options.items() if on)])

    def _read(self) -> dict[str, Any]:
        try:
            found = read_object(self._path)
        except (OSError, ValueError):
            return {}
        # Results of any other form are tried again.
        return {
            key: {size: result for size, result in results.items() if result in _RESULTS}
            for key, results in found.items()
            if isinstance(results, dict)
        }

    def _keep(self, size: str, result: str) -> None:
        self._results[size] = result
        if self._engine.is_main:
            write_json(self._path, self._kept)
