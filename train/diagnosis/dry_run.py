"""Tries each part of a run once: steps, an evaluation, a checkpoint, and a resume from it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from train.checkpoint.damage import unusable
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.saver import CheckpointSaver, SaveRequest
from train.checkpoint.store import CheckpointStore
from train.data.fetch import MicroBatch
from train.data.plan import EvalPlan
from train.diagnosis.bench import Bench, Taken
from train.diagnosis.memory import PeakMemory
from train.exits import NotFiniteError, RetryError, RunError, UsageError
from train.loop.evaluate import evaluate, make_report
from train.loop.evaluation_check import check_evaluation
from train.loop.state import Progress
from train.loop.triggers import Triggers
from train.process.cleanup import cleanup
from train.setup.build import build_evaluation_batches
from train.setup.resume import resume, saved_facts, saved_state

_STEPS = 2
"""Before the checkpoint, and again after it."""
_ROUNDS = 2
"""Micro-batches of the evaluation."""
_SAME = 1e-3
"""Two losses are called the same if they differ by less than this part."""
_COUNTED = 1_000_000
"""Steps of which evaluations and checkpoints are counted, at most."""


class Part(NamedTuple):
    """One part of the run, as the slowest rank saw it."""

    name: str
    seconds: float
    memory: int
    """The largest peak of all ranks in bytes: of what torch allocates on the GPU, else of the
    resident set of the process."""
    note: str


@dataclass
class DryRun:
    """What was measured, the same on all ranks."""

    checkpoint: Path
    parts: list[Part] = field(default_factory=list)
    step_seconds: float = 0.0
    """One step with its data, without what only the first one needs."""
    evaluation_seconds: float = 0.0
    """A whole evaluation, from the time of its first micro-batches."""
    save_seconds: float = 0.0
    checkpoint_bytes: int = 0
    steps: int = 0
    """Of the whole run."""
    evaluations: int = 0
    saves: int = 0

    @property
    def run_seconds(self) -> float:
        """An estimate for the whole run. Checkpoints that are written beside the training count in
        full."""
        return (
            self.steps * self.step_seconds
            + self.evaluations * self.evaluation_seconds
            + self.saves * self.save_seconds
        )


@contextmanager
def temporary_run(bench: Bench) -> Iterator[Path]:
    """A directory beside that of the run, on the same storage, which is removed afterwards;
    collective. Raises RunError on all ranks if it cannot be made, or another dry run uses it."""
    engine, of_run = bench.engine, bench.loaded.run_directory
    directory = RunDirectory(of_run.with_name(f".{of_run.name}.dry-run"))
    fault: RunError | None = None
    try:
        if engine.is_main:
            try:
                directory.acquire()
                _remove(directory.checkpoints)  # of one that was killed
            except RunError as error:
                fault = error
            except OSError as error:
                fault = unusable(directory.path, error)
        if fault := engine.collectives.broadcast_pickled(fault):
            raise fault
        remove = partial(shutil.rmtree, directory.path, ignore_errors=True)
        with cleanup(remove) if engine.is_main else nullcontext():
            yield directory.path
    finally:
        if engine.is_main and fault is None:
            directory.release()


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def dry_run(bench: Bench, directory: Path) -> DryRun:
    """Tries the parts of a run in ``directory``; collective. The weights change. Raises what a run
    raises for what does not work, and UsageError if the steps after a resume are not those
    before."""
    bench = replace(bench, spikes=None)  # which depend on more steps than these
    store = CheckpointStore(directory / "checkpoints")
    found, meter = DryRun(store.path(_STEPS)), _Meter(bench)
    optim, plan = bench.loaded.config.optim, bench.plan
    with meter.part(f"data of {2 * _STEPS} steps") as data, bench.batches(2 * _STEPS) as batches:
        loaded = [[next(batches) for _ in range(plan.accumulation)] for _ in range(2 * _STEPS)]
    taker, first = bench.steps(), list[Taken]()
    for step in range(1, _STEPS + 1):
        with meter.part(f"step {step}") as timed:
            taken = taker.take(loaded[step - 1])
            first.append(taken)
            timed.note = f"loss {taken.loss:.6g}" + (
                f", {plan.accumulation} micro-batches" if plan.accumulation > 1 else ""
            )
    if bench.data.evaluation is not None:
        found.evaluation_seconds = _evaluate(bench, bench.data.evaluation, meter)
    after = Progress(_STEPS, _STEPS * plan.global_batch_size)
    with meter.part("checkpoint") as saved:
        _save(bench, store, after)
        found.checkpoint_bytes = _size(found.checkpoint) if bench.engine.is_main else 0
        saved.note = f"{found.checkpoint_bytes / 2**20:.1f} MiB"
    later = replace(bench, progress=after)
    with meter.part(f"steps {_STEPS + 1} to {2 * _STEPS}") as steady:
        before = _take(later, loaded[_STEPS:])
    _check_finite([*first, *before])
    with meter.part("resume"):
        resume(
            store, after.step, bench.strategy, bench.model.ema, optim,
            fingerprint=bench.data.fingerprint, changes=[], allow_changes=False,
        )  # fmt: skip
    with meter.part("the same steps again") as again:
        resumed = _take(later, loaded[_STEPS:])
        again.note = "the same losses"
    _check_same(before, resumed)
    found.parts = meter.parts
    found.step_seconds = steady.seconds / _STEPS + data.seconds / (2 * _STEPS)
    found.save_seconds = saved.seconds
    _count(bench, found)
    return found


def _take(bench: Bench, steps: Sequence[list[MicroBatch]]) -> list[Taken]:
    taker = bench.steps()
    return [taker.take(micro_batches) for micro_batches in steps]


def _evaluate(bench: Bench, dataset: Sized, meter: _Meter) -> float:
    """Tries the evaluation; returns the seconds that a whole one takes."""
    config, task, strategy, engine = bench.loaded.config, bench.task, bench.strategy, bench.engine
    size = bench.plan.largest_micro_batch
    build = partial(build_evaluation_batches, config, task, dataset, size, engine)
    with meter.part("check of the evaluation"):
        check_evaluation(task, strategy, config, build(most=1), build, stop=lambda: False)
    per_round = config.evaluate.micro_batch_size or size
    rounds = EvalPlan(len(dataset), per_round, engine.world_size).rounds
    tried = min(_ROUNDS, rounds)
    averaged = bench.model.ema.applied() if bench.model.ema else nullcontext()
    with averaged:
        with meter.part("evaluation") as timed, build(most=tried) as batches:
            evaluate(engine, strategy.call, strategy.bare_model, task, batches)
            timed.note = f"{tried} of {rounds} micro-batches"
        with meter.part("report") as report:
            make_report(engine, strategy.call, strategy.bare_model, task, config.run.seed)
    return timed.seconds * rounds / max(tried, 1) + report.seconds


def _save(bench: Bench, store: CheckpointStore, progress: Progress) -> None:
    config, strategy = bench.loaded.config, bench.strategy
    strategy.sync_buffers()
    tensors, values = saved_state(strategy, bench.model.ema)
    order, fingerprint = bench.data.order, bench.data.fingerprint
    facts = saved_facts(order, bench.plan.global_batch_size, config.optim, fingerprint)
    state = {"run": None, "progress": progress.state_dict(), "window": {}, **facts, **values}
    saver = CheckpointSaver(
        store,
        config.checkpoint.model_copy(update={"asynchronous": False}),
        bench.engine.checkpoint_collectives,
    )
    if error := saver.save(tensors, SaveRequest(progress.step, state, None, lambda: None)):
        kind = RetryError if saver.may_retry else RunError
        raise kind(f"The checkpoint could not be written ({error}); correct it, then rerun.")


def _check_finite(steps: Sequence[Taken]) -> None:
    """Gradients alone may not be finite in the first steps: fp16 lowers its loss scale then."""
    if not any(math.isfinite(taken.loss) for taken in steps):
        raise NotFiniteError(
            f"The loss was not finite in each of {len(steps)} steps, so check the task's loss and "
            "the data: `isorun overfit` names the first module that is not finite."
        )


def _check_same(before: Sequence[Taken], resumed: Sequence[Taken]) -> None:
    for number, (old, new) in enumerate(zip(before, resumed, strict=True), start=_STEPS + 1):
        both_wrong = not math.isfinite(old.loss) and not math.isfinite(new.loss)
        if not both_wrong and not math.isclose(old.loss, new.loss, rel_tol=_SAME):
            raise UsageError(
                f"The loss of step {number} is {new.loss:.6g} after a resume from the checkpoint "
                f"of step {_STEPS}, but {old.loss:.6g} without it, so the model or the data have "
                "state that no checkpoint has; register it as a buffer, return it from "
                "get_extra_state(), or derive it from the position in the data."
            )


def _size(checkpoint: Path) -> int:
    return sum(entry.stat().st_size for entry in checkpoint.iterdir())


def _count(bench: Bench, found: DryRun) -> None:
    """Counts the evaluations and checkpoints of the whole run."""
    config, total = bench.loaded.config, bench.data.total_steps
    batch, checkpoint = bench.plan.global_batch_size, config.checkpoint
    triggers = Triggers(
        track=config.track, evaluate=config.evaluate, checkpoint=checkpoint,
        total_steps=total, batch_size=batch, dataset_size=bench.data.order.size,
    )  # fmt: skip
    counted = min(total, _COUNTED)
    steps = range(total - counted + 1, total + 1)
    found.steps = total
    found.saves = sum(map(triggers.save, steps)) * total // counted + 1
    if bench.data.evaluation is not None:
        evaluations = sum(triggers.evaluate(step, step * batch) for step in steps)
        found.evaluations = evaluations * total // counted + config.evaluate.at_start
    if checkpoint.every_minutes:
        found.saves += int(found.run_seconds / 60 / checkpoint.every_minutes)


@dataclass
class _Timed:
    note: str = ""
    seconds: float = 0.0


class _Meter:
    """Measures parts of the run on all ranks."""

    def __init__(self, bench: Bench) -> None:
        self.parts: list[Part] = []
        self._engine, self._memory = bench.engine, PeakMemory(bench.engine.device)

    @contextmanager
    def part(self, name: str) -> Iterator[_Timed]:
        """Measures a part; collective."""
        timed = _Timed()
        self._memory.reset()
        started = time.perf_counter()
        yield timed
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        own = [time.perf_counter() - started, float(self._memory.peak())]
        by_rank = self._engine.collectives.all_gather_floats(own)
        timed.seconds = max(seconds for seconds, _ in by_rank)
        self.parts.append(Part(name, timed.seconds, int(max(m for _, m in by_rank)), timed.note))
