"""A run put together: engine, task, data, checkpoints and tracking, ready for the loop.

:mod:`train.loop.fit` holds the loop and :mod:`train.loop.checkpointing` what it commits; this
file holds how a run is opened, or found again, and closed.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

import torch

from train.checkpoint.mirror import Mirror
from train.checkpoint.mirroring import Mirroring
from train.checkpoint.run_directory import RunDirectory, code_version, write_json
from train.checkpoint.store import CheckpointStore
from train.config.changes import Difference
from train.config.load import LoadedConfig, check_length
from train.config.schema import Config
from train.data.ledger import Ledger
from train.data.loader import Batches, check_dataset, evaluation_batches, training_batches
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan
from train.distributed.randomness import seed_everything
from train.distributed.world import warnings_of
from train.exits import DataError
from train.loop import batch_size_finder
from train.loop.agreement import check_agreement, check_shared
from train.loop.checkpointing import Saving
from train.loop.early_stop import EarlyStop
from train.loop.model_summary import summary
from train.loop.open_run import find_run
from train.loop.resume import moved_dropout, resume
from train.loop.state import Progress
from train.loop.step_metrics import Window
from train.loop.stragglers import Stragglers
from train.loop.triggers import Due
from train.optim.ema import Ema
from train.optim.optimizer import build_optimizer
from train.optim.schedule import learning_rate_factor
from train.process.stop import StopRequest
from train.process.watchdog import StartLimit, Watchdog
from train.strategies.engine import Engine
from train.strategies.meta_init import build_model
from train.track.logs import setup_logging
from train.track.sinks import RunInfo
from train.track.tracker import Tracker


class Run:
    """One attempt at a run, from opening its directory to closing it. A context manager."""

    def __init__(
        self,
        loaded: LoadedConfig,
        directory: RunDirectory,
        changes: list[Difference],
        stop: StopRequest,
        *,
        allow_changes: bool = False,
    ) -> None:
        self.stop = stop
        self.loaded, self.config, self.directory = loaded, loaded.config, directory
        self.changes, self.allow_changes = changes, allow_changes
        self._exit = ExitStack()

    def __enter__(self) -> Run:
        try:
            self._open()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, traceback)

    # -- opening -----------------------------------------------------------------------------

    def _open(self) -> None:
        config = self.config
        self._exit.enter_context(self.stop)
        with StartLimit(config.watchdog):
            self.engine = Engine(config)
            self._exit.callback(self.engine.close)
            self.stop.starting = False
            self.code = code_version()
            self.hosts = check_agreement(self.engine, config, self.code)
            self._open_directory()
            check_shared(self.engine, self.directory.path)
        self.watchdog = self._exit.enter_context(
            Watchdog(
                config.watchdog,
                self.directory.path,
                self.engine.rank,
                self.engine.world_size,
                self.attempt,
            )
        )
        self._build_data()
        if batch_size_finder.wanted(self):
            self.engine.plan = batch_size_finder.fitting_plan(self)
        self.build_model()
        if self.resume_step is not None:
            resume(self, self.resume_step)
        self.start_step = self.progress.step
        self._open_tracking()
        self._begin_attempt()
        self.engine.sum_ints([0])  # nobody takes a step of an attempt that is not written down
        self._exit.callback(self.saving.abandon)
        # Last to be opened, first to be closed: workers never outlive what they feed.
        self.batches = self._exit.enter_context(
            training_batches(
                self.train_dataset,
                self.order,
                self.plan,
                self.engine.rank,
                collate=self.task.collate,
                config=config.loader,
                device_type=self.engine.device.type,
                start_position=self.progress.position,
                steps=self.total_steps - self.progress.step,
            )
        )

    def _open_directory(self) -> None:
        found = find_run(
            self.engine,
            self.loaded,
            self.directory,
            self.changes,
            allow_changes=self.allow_changes,
        )
        self.identity, self.attempt, self.resume_step = (
            found.identity,
            found.attempt,
            found.resume_step,
        )
        self.changes, self._notes = found.changes, found.notes
        self.store = CheckpointStore(self.directory.checkpoints)
        setup_logging(
            self.directory.path, self.engine.rank, self.attempt, self.config.track.log_level
        )

    def _build_data(self) -> None:
        """Task, data and the plan of all steps, from the config and the seed alone."""
        config, engine = self.config, self.engine
        self.task = self.loaded.task(config)
        seed_everything(config.run.seed, engine.device)
        self.train_dataset = self.task.train_dataset()
        check_dataset(self.train_dataset, "train_dataset")
        self.eval_dataset = self.task.eval_dataset()
        if self.eval_dataset is not None:
            check_dataset(self.eval_dataset, "eval_dataset")
        elif asked := _asks_for_evaluation(config):
            raise DataError(
                f"The task {config.task.use!r} has no evaluation data, but {asked} asks for "
                f"evaluation; implement eval_dataset(), or unset {asked}."
            )
        size = len(self.train_dataset)
        self.order = SampleOrder(config.run.seed, size)
        batch_size = config.batch.global_batch_size
        engine.plan = BatchPlan.from_config(config.batch, engine.world_size)
        if config.length.steps is not None:
            self.total_steps = config.length.steps
        else:
            assert config.length.epochs is not None
            samples = math.ceil(round(config.length.epochs * size, 6))
            self.total_steps = -(-samples // batch_size)
        check_length(config, self.loaded.composed, self.total_steps)
        self.due = Due(config, self.total_steps, size)
        self.learning_rate_factor = learning_rate_factor(config.schedule, self.total_steps)
        self._evaluation: Batches | None = None

    @property
    def plan(self) -> BatchPlan:
        """How each step is cut into micro-batches."""
        return self.engine.plan

    def forget_model(self) -> None:
        """Undoes ``build_model``, also one that broke off."""
        for name in ("ema", "window", "saving"):
            self.__dict__.pop(name, None)
        self.engine.forget()

    def build_model(self) -> None:
        """Model and optimiser, spread over the ranks, and the counters of a run that begins."""
        config, engine = self.config, self.engine
        seed_everything(config.run.seed, engine.device)
        model, initial = build_model(self.task, config.run.seed)
        self.model_summary = summary(model)
        if config.compile:
            model.compile()
        origin = self.loaded.composed.origin("optim.use")
        engine.prepare(
            model,
            lambda placed: build_optimizer(config.optim, placed, origin),
            self.task.blocks(model),
            initial,
        )
        engine.model.train()
        self.ema = Ema(config.ema, engine.strategy) if config.ema else None
        self.early_stop = EarlyStop(config.early_stop) if config.early_stop else None
        self.progress = Progress()
        self.window = Window(self)
        self.stragglers = Stragglers()
        self.saving = Saving(self, self.store)

    def _open_tracking(self) -> None:
        config = self.config
        info = RunInfo(
            id=self.identity.id,
            name=self.identity.name,
            directory=self.directory.path,
            attempt=self.attempt,
            wandb_id=self.identity.wandb_id,
            config=config.model_dump(mode="json"),
            code=self.code,
            unit=self.task.unit,
            total_steps=self.total_steps,
            start_step=self.progress.step,
        )
        self.tracker = Tracker(config.track, info, is_main=self.engine.is_main)
        self._exit.callback(self.tracker.close)
        gpus = torch.cuda.device_count() if self.engine.device.type == "cuda" else 0
        moved = moved_dropout(self.directory.last_attempt(), self.plan, self.engine.bare_model)
        for note in [*self._notes, *warnings_of(self.engine.world, gpus), *moved]:
            self.tracker.warn(note)

    def _begin_attempt(self) -> None:
        """From here on the directory knows of this attempt."""
        self.stop.what_is_lost = self.what_is_lost
        if not self.engine.is_main:
            return
        self.stop.watch(self.directory.stop_file)
        self.directory.unfinish()
        for name, settings in self.engine.strategy.files().items():
            write_json(self.directory.path / name, settings)
        self.directory.store_config(self.config.model_dump(mode="json"))
        self.directory.record_attempt(
            {
                "attempt": self.attempt,
                "time": time.time(),
                "resumed_from_step": self.resume_step,
                "world_size": self.engine.world_size,
                "hosts": list(dict.fromkeys(self.hosts)),
                "strategy": self.engine.strategy_name,
                "micro_batch_size": self.plan.largest_micro_batch,
                "device": self.engine.device.type,
                "code": self.code,
                "changes": [str(change) for change in self.changes],
            }
        )
        if mirror := self.config.checkpoint.mirror:
            self.mirroring = Mirroring(
                Mirror(mirror), self.store, self.identity.id, self.tracker.warn
            )
            self.saving.committed(self.mirroring.committed)
            self._exit.push(self._close_mirroring)
        self.saving.ledger = ledger = Ledger(self.directory.ledger)
        self._exit.callback(ledger.close)
        ledger.begin_attempt(
            attempt=self.attempt,
            resume_step=self.progress.step,
            resume_position=self.progress.position,
            order=self.order,
        )

    def _close_mirroring(self, error: type[BaseException] | None, *_: object) -> None:
        """A run that failed is not kept from starting again by copies that can wait."""
        assert self.config.checkpoint.mirror is not None
        wait = min(self.config.checkpoint.mirror.wait, self.stop.seconds_left - 1)
        self.mirroring.close(0.0 if error else wait, lambda: self.beat("waiting for the mirror"))

    # -- what the loop asks for --------------------------------------------------------------

    def evaluation_batches(self) -> Batches:
        """A pass over the evaluation data, to be entered; made once: its workers may persist."""
        if self._evaluation is None:
            assert self.eval_dataset is not None
            micro = self.config.evaluate.micro_batch_size or self.plan.largest_micro_batch
            self._evaluation = evaluation_batches(
                self.eval_dataset,
                EvalPlan(len(self.eval_dataset), micro, self.engine.world_size),
                self.engine.rank,
                seed=self.config.run.seed,
                collate=self.task.collate,
                config=self.config.loader,
                device_type=self.engine.device.type,
            )
            self._exit.callback(self._evaluation.close)
        return self._evaluation

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The model with averaged weights, where the config asks for an average."""
        return self.ema.applied() if self.ema else nullcontext()

    def beat(self, phase: str) -> None:
        """Tells the watchdog what this rank begins to do."""
        self.watchdog.heart.beat(phase, self.progress.step)

    def what_is_lost(self) -> str:
        """In words: from where the run goes on, if it ends now."""
        saved, step = self.saving.last_step or 0, self.progress.step
        lost = f"; the {step - saved} steps since are lost" if step > saved else ""
        return (
            f"The last committed checkpoint is that of step {saved}{lost}. Run it again to go on."
        )

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return self.loaded.command("fit")


def _asks_for_evaluation(config: Config) -> str | None:
    """A key of the config that makes no sense without evaluation data."""
    evaluate = config.evaluate
    asked = {
        "early_stop": config.early_stop,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "evaluate.every_steps": evaluate.every_steps,
        "evaluate.every_epochs": evaluate.every_epochs,
        "evaluate.at_start": evaluate.at_start,
    }
    return next((key for key, value in asked.items() if value), None)
