"""The first steps of a config on this placement, without a run directory.

Nothing is written: no checkpoint, no metrics, no lock. A run of the same config starts as if the
trial had not been.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.config.load import LoadedConfig
from train.data.fetch import MicroBatch
from train.data.ledger import position_after
from train.data.loader import Batches, training_batches
from train.data.plan import BatchPlan
from train.distributed.collectives import Collectives
from train.goodput.clock import PhaseClock
from train.loop.first_step import FirstStepChecks
from train.loop.state import Progress
from train.loop.step_agreement import Agreed
from train.loop.train_step import TrainStep
from train.optim.schedule import learning_rate_factor
from train.optim.spikes import SpikeGuard
from train.process.cleanup import temporary_directory
from train.setup.batch_size_finder import BatchSizeFinder, is_wanted
from train.setup.build import (
    RunData,
    StrategyChoice,
    TrainableModel,
    build_data,
    build_engine,
    build_trainable,
    choose_strategy,
)
from train.setup.resume import resume
from train.strategies.base import Strategy
from train.strategies.engine import Engine
from train.tasks.base import Task

_log = logging.getLogger("train")


@dataclass(frozen=True)
class Bench:
    """What the steps of a trial are taken with; the same on all ranks."""

    loaded: LoadedConfig
    task: Task
    engine: Engine
    data: RunData
    plan: BatchPlan
    model: TrainableModel
    progress: Progress
    """Where the steps begin: at the start of a run, or at a checkpoint."""
    window: Mapping[str, Any]
    """What the checkpoint has of the steps since the last log line before it."""
    spikes: SpikeGuard | None
    """Judges the steps as a run does, but never ends it; None where the config does not ask."""

    @property
    def strategy(self) -> Strategy:
        """The model with its optimiser, on its ranks."""
        return self.model.strategy

    def batches(self, steps: int) -> Batches:
        """This rank's micro-batches of the next ``steps`` steps."""
        return training_batches(
            self.data.train,
            self.data.order,
            self.plan,
            self.engine.rank,
            collate=self.task.collate,
            config=self.loaded.config.loader,
            device_type=self.engine.device.type,
            start_position=self.progress.position,
            steps=steps,
        )

    def steps(
        self,
        learning_rate: Callable[[int], float] | None = None,
        clock: PhaseClock | None = None,
    ) -> Steps:
        """Takes steps with a learning rate that is a function of the step, 0 for the first step of
        a run; by default those that the run would take, with the config's schedule and spikes.
        ``clock`` gets their phases."""
        config = self.loaded.config
        spikes = self.spikes if learning_rate is None else None
        if learning_rate is None:
            origin = self.loaded.composed.origin("schedule.use")
            schedule = learning_rate_factor(config.schedule, self.data.total_steps, origin)
        else:
            chosen, base = learning_rate, config.optim.lr

            def schedule(step: int) -> float:
                return chosen(step) / base

        return Steps(self, schedule, spikes, clock or PhaseClock())


class Taken(NamedTuple):
    """The numbers of a step, on the host."""

    loss: float
    """Mean over the global batch."""
    units: int
    """Units of the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    skipped: bool
    """Whether the weights have not changed: the step is not finite, or a spike."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Steps:
    """Takes steps of a bench, one by one."""

    def __init__(
        self,
        bench: Bench,
        schedule: Callable[[int], float],
        spikes: SpikeGuard | None,
        clock: PhaseClock,
    ) -> None:
        """``schedule``: the factor on the config's learning rate, as a function of the step."""
        self._step = bench.progress.step
        self._checks: FirstStepChecks | None = FirstStepChecks(
            bench.task,
            bench.strategy,
            compiled=bench.loaded.config.compile,
            precision=bench.loaded.config.precision,
            warn=_log.warning,
        )
        self._take = TrainStep(
            bench.task,
            bench.strategy,
            optim=bench.loaded.config.optim,
            schedule=schedule,
            seed=bench.loaded.config.run.seed,
            ema=bench.model.ema,
            spikes=spikes,
            agree=lambda count: _agree(bench.engine.collectives, count),
            timed=clock.within,
            beat=lambda phase: None,
        ).take

    def take(self, micro_batches: Sequence[MicroBatch]) -> Taken:
        """The next step; collective. Reads its numbers from the device."""
        taken = self._take(micro_batches, self._step, self._checks)
        assert taken is not None  # nobody asks for a stop
        self._checks = None
        self._step += 1
        count = taken.agreed.global_count
        loss = float(taken.result.loss_sum) / count
        norm, skipped = float(taken.result.grad_norm), bool(taken.result.skipped)
        return Taken(loss, count, norm, taken.learning_rate, skipped)


def _agree(collectives: Collectives, count: int) -> Callable[[], Agreed]:
    pending = collectives.start_all_reduce_ints([count])
    return lambda: Agreed(pending()[0], stop=False, save=False)


@contextmanager
def open_bench(
    loaded: LoadedConfig,
    resume_from: Path | None = None,
    micro_batch_size: int | None = None,
    attempt: int | None = None,
) -> Iterator[Bench]:
    """The engine, data and model of a config's first step, or of that after the checkpoint
    ``resume_from``; collective. ``micro_batch_size``: the largest one where the config leaves it
    open. ``attempt``: that whose samples follow the checkpoint, by default the newest. Raises what
    the start of a run raises for a config that cannot be run."""
    choice = choose_strategy(loaded)
    engine = build_engine(loaded.config, choice)
    with ExitStack() as stack:
        stack.push(engine.leave)
        task = loaded.task(loaded.config)
        progress, window = Progress(), dict[str, Any]()
        config = loaded.config.optim.spike
        spikes = SpikeGuard(config.skipping(), engine.device) if config else None
        if resume_from:
            state = Manifest.read(resume_from).state
            progress.load_state_dict(state["progress"])
            ledger = RunDirectory(loaded.run_directory).ledger
            progress.position = position_after(ledger, progress.step, progress.position, attempt)
            window = state["window"]
            if spikes and state.get("spikes"):
                spikes.load_state_dict(state["spikes"])
        data = build_data(
            loaded,
            task,
            engine.collectives,
            engine.device,
            step=progress.step,
            position=progress.position,
        )
        for warning in data.warnings if engine.is_main else ():
            _log.warning(warning)
        plan = _plan(loaded, task, data, engine, choice, micro_batch_size)
        model = build_trainable(loaded, task, engine, choice, plan)
        if resume_from:
            resume(
                CheckpointStore(resume_from.parent),
                progress.step,
                model.strategy,
                model.ema,
                loaded.config.optim,
                fingerprint=data.fingerprint,
                changes=[],
                allow_changes=False,
            )
        yield Bench(loaded, task, engine, data, plan, model, progress, window, spikes)


def _plan(
    loaded: LoadedConfig,
    task: Task,
    data: RunData,
    engine: Engine,
    choice: StrategyChoice,
    largest: int | None,
) -> BatchPlan:
    config = loaded.config
    if largest and config.batch.micro_batch_size == "auto":
        return BatchPlan(config.batch.global_batch_size, largest, engine.world_size)
    if not is_wanted(config.batch, engine.device):
        return BatchPlan.from_config(config.batch, engine.world_size)
    with _finder(loaded, task, data, engine, choice) as finder:
        return finder.find()


@contextmanager
def _finder(
    loaded: LoadedConfig, task: Task, data: RunData, engine: Engine, choice: StrategyChoice
) -> Iterator[BatchSizeFinder]:
    """A finder that keeps nothing."""
    with temporary_directory() as directory:
        yield BatchSizeFinder(
            loaded.config,
            task,
            data.train,
            engine,
            choice.name,
            build=lambda plan: build_trainable(loaded, task, engine, choice, plan),
            directory=directory,
            beat=lambda phase: None,
        )


@contextmanager
def open_finder(loaded: LoadedConfig) -> Iterator[tuple[BatchSizeFinder, Engine, str]]:
    """What tries micro-batches of a config, the engine, and the name of the strategy; there is no
    model yet. Collective."""
    choice = choose_strategy(loaded)
    engine = build_engine(loaded.config, choice)
    with ExitStack() as stack:
        stack.push(engine.leave)
        task = loaded.task(loaded.config)
        data = build_data(loaded, task, engine.collectives, engine.device)
        finder = stack.enter_context(_finder(loaded, task, data, engine, choice))
        yield finder, engine, choice.name
