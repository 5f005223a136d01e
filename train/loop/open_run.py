"""Opens a run, or finds it again, and closes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.damage import refused_files
from train.checkpoint.manifest import Manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.config.changes import Difference
from train.config.load import LoadedConfig
from train.data.loader import Batches, training_batches
from train.data.plan import BatchPlan
from train.exits import Exit, ResumeRefusedError, RetryError
from train.goodput.clock import PhaseClock
from train.goodput.ledger import GoodputLedger
from train.hooks import Facts, Hooks
from train.loop.checkpointing import Checkpointing
from train.loop.data_watch import DataWatch
from train.loop.early_stop import EarlyStop
from train.loop.evaluation import Evaluation
from train.loop.evaluation_check import check_evaluation
from train.loop.failure import on_error
from train.loop.first_step import FirstStepChecks
from train.loop.memory_advice import advising
from train.loop.open_tracker import open_tracker
from train.loop.run import OpenRun, resume_point
from train.loop.state import Progress
from train.loop.step_agreement import StepAgreement
from train.loop.step_metrics import StepMetrics
from train.loop.stragglers import Stragglers
from train.loop.train_step import TrainStep
from train.loop.triggers import Triggers
from train.optim.schedule import learning_rate_factor
from train.optim.spikes import SpikeGuard
from train.process.stop import StopRequest
from train.setup.batch_size_finder import BatchSizeFinder, is_wanted
from train.setup.build import (
    RunData,
    TrainableModel,
    build_data,
    build_evaluation_batches,
    build_trainable,
)
from train.setup.facts import attempt_facts
from train.setup.init_from import (
    changes_without_effect,
    find_initial_weights,
    load_initial_weights,
)
from train.setup.join import Joined, join_ranks
from train.setup.records import Records, open_records, record_attempt
from train.setup.resume import resume, saved_facts
from train.tasks.base import Task
from train.tasks.checked import flops_of
from train.track.tracker import Tracker

if TYPE_CHECKING:
    from train.profiling.recorder import Recorder

_log = logging.getLogger("train")


@contextmanager
def open_run(
    loaded: LoadedConfig,
    directory: RunDirectory,
    changes: list[Difference],
    stop: StopRequest,
    *,
    allow_changes: bool = False,
    clock: PhaseClock | None = None,
) -> Iterator[OpenRun]:
    """One attempt at the run of ``directory``; collective. ``changes`` are those of the config
    since the start before; ``stop`` is entered here; ``clock`` has the time since the start, by
    default from now. Leaving the context closes everything, last opened first."""
    goodput = GoodputLedger(clock or PhaseClock())
    with ExitStack() as stack, refused_files(directory.path):
        stack.callback(goodput.close)
        stack.push(on_error(lambda code, _: goodput.ended(code)))
        joined = join_ranks(
            stack, loaded, directory, changes, stop, goodput, allow_changes=allow_changes
        )
        if loaded.config.profile and loaded.config.profile.memory:
            from train.loop.profiling import start_memory_history

            start_memory_history(joined.engine.device)
        opened = _open(stack, loaded, directory, joined, allow_changes=allow_changes)
        try:
            with advising(loaded, opened.task, opened.data, opened.plan, opened.model):
                yield opened
        finally:
            goodput.clock.enter("shutdown")


def _open(
    stack: ExitStack,
    loaded: LoadedConfig,
    directory: RunDirectory,
    joined: Joined,
    *,
    allow_changes: bool,
) -> OpenRun:
    config, engine, attempt, stop = loaded.config, joined.engine, joined.attempt, joined.stop
    progress = Progress()

    def beat(phase: str) -> None:
        joined.heartbeat.update(phase, progress.step)

    beat("reading init_from")
    source = find_initial_weights(stack, loaded, directory, joined)
    task = loaded.task(config)
    store = CheckpointStore(directory.checkpoints)
    if attempt.resume_step is not None:
        progress.load_state_dict(Manifest.read(store.path(attempt.resume_step)).state["progress"])
        progress.position = attempt.left_out or progress.position
    data = build_data(
        loaded,
        task,
        engine.collectives,
        engine.device,
        step=progress.step,
        position=progress.position,
    )
    _check_unfinished(loaded, directory, data.total_steps)
    # What a user's own code can refuse comes before anything is recorded.
    origin = loaded.composed.origin("schedule.use")
    schedule = learning_rate_factor(config.schedule, data.total_steps, origin)
    plan = _plan(loaded, task, data, joined, directory, beat)
    model = build_trainable(loaded, task, engine, joined.choice, plan)
    due = config.evaluate.is_scheduled or progress.evaluation_due
    warnings = _check_evaluation(loaded, task, data, plan, model, joined, beat) if due else []
    joined.heartbeat.calls = model.strategy.call_record
    metrics = _step_metrics(loaded, task, data, joined)
    early_stop = EarlyStop(config.early_stop) if config.early_stop else None
    spikes = SpikeGuard(config.optim.spike, engine.device) if config.optim.spike else None
    notes: list[str] = []
    with joined.goodput.clock.within("restore"):
        initial = load_initial_weights(source, model.strategy, model.ema) if source else None
    if initial:
        notes = initial.notes
    if attempt.resume_step is not None:
        with joined.goodput.clock.within("restore"):
            resumed = resume(
                store,
                attempt.resume_step,
                model.strategy,
                model.ema,
                config.optim,
                fingerprint=data.fingerprint,
                changes=attempt.changes,
                allow_changes=allow_changes,
            )
        state, notes = resumed.state, resumed.notes + changes_without_effect(attempt)
        _restore_loop(state, metrics, early_stop, spikes)
    facts = attempt_facts(loaded, joined, data, plan, model)
    tracker = open_tracker(
        stack, loaded, directory, store, joined, task, data, plan, model, progress, facts,
        [*warnings, *notes],
        [name for name in (attempt.artifact, source and source.source.artifact) if name],
    )  # fmt: skip
    resumed_from = None if attempt.resume_step is None else store.path(attempt.resume_step)
    hooks = _hooks(loaded, directory, joined, data, tracker, resumed_from)

    def call_failure_hooks(code: Exit, text: str) -> None:
        if code != Exit.STOPPED_AT_ONCE:
            beat("calling hooks")
            hooks.failure(code, text)

    stack.push(on_error(call_failure_hooks))
    records = _open_records(
        stack, loaded, directory, store, joined, data, plan, model, progress, tracker, beat,
        {**facts, "init_from": initial.record if initial else None},
    )  # fmt: skip
    engine.collectives.barrier()  # no rank takes a step of an attempt that is not recorded
    checkpointing = Checkpointing(
        store,
        config.checkpoint,
        model.strategy,
        model.ema,
        tracker=tracker,
        ledger=records.ledger if records else None,
        facts={
            "run": attempt.identity.id,
            "attempt": attempt.number,
            **saved_facts(data.order, plan.global_batch_size, config.optim, data.fingerprint),
        },
        last_step=attempt.resume_step,
        ensure_in_place=directory.ensure_in_place,
        mirroring=records.mirroring if records else None,
    )  # fmt: skip
    stack.callback(checkpointing.close)
    joined.goodput.steps = lambda: (progress.step, checkpointing.last_step or 0)
    stop.report_at_deadline(lambda: resume_point(checkpointing.last_step_on_disk, progress.step))
    triggers = Triggers(
        track=config.track,
        evaluate=config.evaluate,
        checkpoint=config.checkpoint,
        total_steps=data.total_steps,
        batch_size=plan.global_batch_size,
        dataset_size=data.order.size,
    )
    # Opened last, closed first: data workers end before what they load for.
    batches = stack.enter_context(_batches(loaded, task, data, plan, joined, progress))
    return OpenRun(
        loaded=loaded,
        directory=directory,
        joined=joined,
        beat=beat,
        task=task,
        data=data,
        plan=plan,
        model=model,
        initial=initial,
        progress=progress,
        metrics=metrics,
        stragglers=Stragglers(joined.hosts),
        triggers=triggers,
        early_stop=early_stop,
        spikes=spikes,
        tracker=tracker,
        checkpointing=checkpointing,
        hooks=hooks,
        recorder=_recorder(stack, loaded, directory, joined, tracker),
        evaluation=_open_evaluation(stack, loaded, task, data, plan, model, joined, beat),
        first_step=FirstStepChecks(
            task,
            model.strategy,
            compiled=config.compile,
            precision=config.precision,
            warn=tracker.warn,
        ),
        train_step=TrainStep(
            task,
            model.strategy,
            optim=config.optim,
            schedule=schedule,
            seed=config.run.seed,
            ema=model.ema,
            spikes=spikes,
            agree=StepAgreement(engine.collectives, stop, triggers, checkpointing, beat).start,
            timed=metrics.timed,
            beat=beat,
        ),
        data_watch=DataWatch(
            {"train_dataset": data.train, "eval_dataset": data.evaluation},
            unit=task.unit,
            batch_size=plan.global_batch_size,
            warn=tracker.warn,
        ),
        batches=batches,
    )


def _check_evaluation(
    loaded: LoadedConfig,
    task: Task,
    data: RunData,
    plan: BatchPlan,
    model: TrainableModel,
    joined: Joined,
    beat: Callable[[str], None],
) -> list[str]:
    """Returns warnings."""
    if data.evaluation is None:
        return []
    build = partial(
        build_evaluation_batches,
        loaded.config, task, data.evaluation, plan.largest_micro_batch, joined.engine,
    )  # fmt: skip

    def stop() -> bool:
        beat("checking the evaluation")
        return joined.stop.requested

    beat("checking the evaluation")
    with advising(loaded, task, data, plan, model):
        first = build(most=1)
        return check_evaluation(task, model.strategy, loaded.config, first, build, stop=stop)


def _check_unfinished(loaded: LoadedConfig, directory: RunDirectory, total_steps: int) -> None:
    """Refuses changes of a finished run that leave nothing to train: it would seem to be the
    result of the changed config."""
    finished = directory.finished()
    if finished and finished["step"] >= total_steps:
        raise ResumeRefusedError(
            f"The run in {loaded.run_directory_as_set} is finished, at step {finished['step']}, "
            f"and the changed config asks for {total_steps} steps, so that nothing is left to "
            "train; choose another run.name or run.dir for a new run, or make this one longer."
        )


def _plan(
    loaded: LoadedConfig,
    task: Task,
    data: RunData,
    joined: Joined,
    directory: RunDirectory,
    beat: Callable[[str], None],
) -> BatchPlan:
    """The config's plan, or the one that was found to fit into memory."""
    config, engine = loaded.config, joined.engine
    if not is_wanted(config.batch, engine.device):
        return BatchPlan.from_config(config.batch, engine.world_size)

    def build(plan: BatchPlan) -> TrainableModel:
        return build_trainable(loaded, task, engine, joined.choice, plan)

    finder = BatchSizeFinder(
        config,
        task,
        data.train,
        engine,
        joined.choice.name,
        build=build,
        directory=directory.path,
        beat=beat,
    )
    return finder.find()


def _restore_loop(
    state: dict[str, Any],
    metrics: StepMetrics,
    early_stop: EarlyStop | None,
    spikes: SpikeGuard | None,
) -> None:
    """Restores from the state of a checkpoint what depends on the steps before it."""
    metrics.load_state_dict(state["window"])
    if early_stop and state["early_stop"]:
        early_stop.load_state_dict(state["early_stop"])
    if spikes and state.get("spikes"):
        spikes.load_state_dict(state["spikes"])


def _step_metrics(loaded: LoadedConfig, task: Task, data: RunData, joined: Joined) -> StepMetrics:
    return StepMetrics(
        joined.goodput.clock,
        unit=task.unit,
        flops_per_sample=flops_of(task),
        device=joined.engine.device,
        precision=loaded.config.precision,
        world_size=joined.engine.world_size,
        global_batch_size=loaded.config.batch.global_batch_size,
        dataset_size=data.order.size,
        looks_for_spikes=loaded.config.optim.spike is not None,
    )


def _open_records(
    stack: ExitStack,
    loaded: LoadedConfig,
    directory: RunDirectory,
    store: CheckpointStore,
    joined: Joined,
    data: RunData,
    plan: BatchPlan,
    model: TrainableModel,
    progress: Progress,
    tracker: Tracker,
    beat: Callable[[str], None],
    facts: dict[str, Any],
) -> Records | None:
    """The records of rank 0; None on other ranks."""
    if not joined.engine.is_main:
        return None
    config = loaded.config
    joined.stop.watch_file(directory.stop_file)
    values = config.model_dump(mode="json")
    size = plan.largest_micro_batch
    record_attempt(directory, values, joined, model.strategy, data.order, size, facts)
    number = joined.attempt.number

    def record_end(code: Exit, text: str) -> None:
        with suppress(RetryError):  # the error that ends the run is reported
            directory.record_end(number, code, text)

    def record_error(code: Exit, text: str) -> None:
        if not joined.stop.abrupt_end.begun:
            record_end(code, text)

    def record_abrupt_end(code: Exit, text: str) -> None:
        ended = directory.attempts.by_number().get(number, {}).get("ended", {})
        if ended.get("code") not in (Exit.DONE, Exit.PREEMPTED):
            record_end(code, text)
        joined.goodput.ended(code)
        joined.goodput.close()

    stack.push(on_error(record_error))
    joined.stop.abrupt_end.record_by(record_abrupt_end)
    stack.callback(joined.stop.abrupt_end.record_by, None)
    mirror = config.checkpoint.mirror
    return open_records(
        stack,
        directory,
        store,
        joined,
        data.order,
        step=progress.step,
        position=progress.position,
        mirror=Mirror(mirror) if mirror else None,
        mirror_wait=mirror.wait if mirror else 0.0,
        warn=tracker.warn,
        beat=beat,
    )


def _recorder(
    stack: ExitStack,
    loaded: LoadedConfig,
    directory: RunDirectory,
    joined: Joined,
    tracker: Tracker,
) -> Recorder | None:
    if loaded.config.profile is None:
        return None
    from train.loop.profiling import open_recorder

    return open_recorder(stack, loaded.config.profile, directory, joined, tracker)


def _hooks(
    loaded: LoadedConfig,
    directory: RunDirectory,
    joined: Joined,
    data: RunData,
    tracker: Tracker,
    checkpoint: Path | None,
) -> Hooks:
    facts = Facts(
        id=joined.attempt.identity.id,
        name=joined.attempt.identity.name,
        directory=directory.path,
        config=loaded.config.model_dump(mode="json"),
        rank=joined.engine.rank,
        world_size=joined.engine.world_size,
        total_steps=data.total_steps,
        checkpoint=checkpoint,
    )
    origin = loaded.composed.origin("hooks")
    return Hooks(loaded.config.hooks, facts, origin=origin, warn=tracker.warn)


def _batches(
    loaded: LoadedConfig,
    task: Task,
    data: RunData,
    plan: BatchPlan,
    joined: Joined,
    progress: Progress,
) -> Batches:
    """This rank's micro-batches from the present step to the end of the run."""
    return training_batches(
        data.train,
        data.order,
        plan,
        joined.engine.rank,
        collate=task.collate,
        config=loaded.config.loader,
        device_type=joined.engine.device.type,
        start_position=progress.position,
        steps=data.total_steps - progress.step,
    )


def _open_evaluation(
    stack: ExitStack,
    loaded: LoadedConfig,
    task: Task,
    data: RunData,
    plan: BatchPlan,
    model: TrainableModel,
    joined: Joined,
    beat: Callable[[str], None],
) -> Evaluation | None:
    """None where the task has no evaluation data."""
    if data.evaluation is None:
        return None
    config, engine = loaded.config, joined.engine
    batches = build_evaluation_batches(
        config, task, data.evaluation, plan.largest_micro_batch, engine
    )
    stack.callback(batches.close)
    return Evaluation(
        task,
        model.strategy,
        model.ema,
        batches,
        seed=config.run.seed,
        stop=lambda: joined.stop.requested,
        beat=beat,
    )
