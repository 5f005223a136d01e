"""The largest micro-batch that fits into memory, found by trying before the first step.

What fits depends on model, strategy and device, and is not known before. So steps are taken with
one micro-batch for the whole share of a rank, with two, four ... until memory suffices, then the
range in between is halved. Every trial has a model of its own, which is thrown away: whatever an
operation that ran out of memory left behind, the run never sees it. The result is kept in the run
directory: a run that is started again tries nothing.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.plan import BatchPlan
from train.exits import OutOfMemoryError, RetryError, first_line
from train.files import write_json
from train.loop.compile_check import check_compiled
from train.process.diagnose import is_out_of_memory

if TYPE_CHECKING:
    from train.loop.run import Run

_log = logging.getLogger("train")
FILE = "micro_batches.json"
# Ranks that wait for one that ran out of memory in the middle of an exchange wait in vain.
_PATIENCE = timedelta(minutes=5)


def wanted(run: Run) -> bool:
    """Whether the config leaves the size to be found, on a device that says when it is full."""
    batch = run.config.batch
    on_gpu = run.engine.device.type == "cuda"
    return batch.micro_batch_size == "auto" and (on_gpu if batch.try_out is None else batch.try_out)


def fitting_plan(run: Run) -> BatchPlan:
    """The plan with the fewest micro-batches per step that fit; the same on every rank.

    Raises OutOfMemoryError where not even the smallest do.
    """
    batch, ranks = run.config.batch.global_batch_size, run.engine.world_size
    trials = _Trials(run)
    most = max(batch // ranks, 1)  # micro-batches of a rank, such that none is empty
    failed, fits = 0, 1
    while not trials.fit(fits):
        if fits == most:
            raise OutOfMemoryError(
                "Out of memory with one sample per rank and micro-batch; set "
                "activation_checkpointing=true, or cut the model over more ranks with "
                "strategy=fsdp2."
            )
        failed, fits = fits, min(2 * fits, most)
    while fits - failed > 1:
        middle = (failed + fits) // 2
        failed, fits = (failed, middle) if trials.fit(middle) else (middle, fits)
    return trials.plan(fits)


class _Trials:
    """Tries plans, and remembers what came of it."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.directory.path / FILE
        self._kept: dict[str, Any] = run.engine.broadcast(self._read())
        self._mine: dict[str, Any] = self._kept.setdefault(self._key(), {})

    def plan(self, accumulation: int) -> BatchPlan:
        """With so many micro-batches per rank and step."""
        batch, ranks = self.run.config.batch.global_batch_size, self.run.engine.world_size
        return BatchPlan(batch, -(-batch // (ranks * accumulation)), ranks)

    def fit(self, accumulation: int) -> bool:
        """Whether so many micro-batches per step fit, on all ranks."""
        plan = self.plan(accumulation)
        size = str(plan.largest_micro_batch)
        if self._mine.get(size) == "begun":
            # The machine may have ended the process, or one rank alone was out of memory.
            _log.warning(
                "the trial of micro-batches of %s did not end the last time, so it counts as too "
                "large; remove %s to try again",
                *(size, self.path),
            )
            self._remember(size, "too large")
        elif size not in self._mine:
            self._remember(size, "begun")
            self._remember(size, "fits" if self._try(plan) else "too large")
        return bool(self._mine[size] == "fits")

    def _try(self, plan: BatchPlan) -> bool:
        run, size = self.run, plan.largest_micro_batch
        run.watchdog.heartbeat.update(f"trying micro-batches of {size}", 0)
        run.engine.plan = plan
        group = dist.new_group(backend="gloo", timeout=_PATIENCE) if plan.world_size > 1 else None
        # First without an exchange (where the strategy can): ranks must not wait for one that
        # has no room.
        fits = all(self._all_have_room(group, part, size) for part in (_alone, _together))
        run.forget_model()
        gc.collect()
        if run.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        if group is not None:
            dist.destroy_process_group(group)
        return fits

    def _all_have_room(self, group: Any, part: Callable[[Run, int], None], size: int) -> bool:
        error = None
        try:
            part(self.run, size)
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            error = first_line(raised)
            _log.info("micro-batches of %d do not fit on this rank: %s", size, error)
        failed = torch.tensor([error is not None], dtype=torch.int64)
        if group is not None:
            try:
                dist.all_reduce(failed, group=group)
            except RuntimeError as missing:
                raise RetryError(
                    f"Micro-batches of {size} fit into the memory of some ranks only, which wait "
                    "for the others; start the run again, and smaller ones are tried."
                ) from missing
        return not failed.item()

    def _key(self) -> str:
        """What the result depends on, besides the code."""
        engine, config = self.run.engine, self.run.config
        memory = 0
        if engine.device.type == "cuda":
            memory = torch.cuda.get_device_properties(engine.device).total_memory
        facts = [
            engine.strategy_name, f"x{engine.world_size}", config.precision,
            f"batch {config.batch.global_batch_size}", f"{engine.device.type} {memory >> 30} GiB",
        ]  # fmt: skip
        options = {"compiled": config.compile, "checkpointing": config.activation_checkpointing}
        return ", ".join([*facts, *(name for name, on in options.items() if on)])

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, size: str, result: str) -> None:
        self._mine[size] = result
        if self.run.engine.is_main:
            write_json(self.path, self._kept)


def _alone(run: Run, size: int) -> None:
    """One micro-batch, whose gradients are kept."""
    run.build_model()
    if run.config.compile:
        batch = run.engine.to_device(_batch(run, size))
        check_compiled(run.task, run.engine.bare_model, batch, run.config.precision)
    run.engine.strategy.zero_grad()
    _micro_batch(run, size, last=False)


def _together(run: Run, size: int) -> None:
    """Two steps, so that the optimiser's state and gradients of earlier micro-batches are there
    as well."""
    for step in range(2):
        loss_sum = _micro_batch(run, size, last=step == 0 or run.plan.accumulation == 1)
        if step == 1 and run.plan.accumulation > 1:
            loss_sum += _micro_batch(run, size, last=True)
        run.engine.step(run.engine.begin_sum(loss_sum), run.config.optim.clip_norm)
        run.engine.strategy.zero_grad()


def _micro_batch(run: Run, size: int, *, last: bool) -> Tensor:
    batch = _batch(run, size)
    count = int(run.task.count(batch)) * run.engine.world_size
    with run.engine.strategy.accumulating(last=last):
        loss = run.task.loss(run.engine.model, run.engine.to_device(batch))
        run.engine.backward(loss.sum, count)
    return torch.as_tensor(loss.sum.detach())


def _batch(run: Run, size: int) -> Any:
    """The first samples, on every rank alike."""
    data = run.train_dataset
    return run.task.collate([data[index % len(data)] for index in range(size)])
