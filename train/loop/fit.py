"""The loop: one pass per optimiser step, until the run is complete or somebody asks for a stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from train.data.fetch import MicroBatch
from train.data.ledger import StepRecord
from train.data.order import micro_batch_seed
from train.distributed.randomness import seed_everything
from train.exits import Exit, NotFiniteError, RetryError, UsageError
from train.loop.compile_check import check_compiled
from train.loop.early_stop import metric_value
from train.loop.evaluate import EvaluationStoppedError, evaluate
from train.loop.report import announce, farewell
from train.loop.run import Run
from train.optim.optimizer import set_learning_rate


def fit(run: Run) -> Exit:
    """Trains from where the run stands to its end; the exit code says how it ended."""
    announce(run)
    progress, due = run.progress, run.due
    if progress.evaluation_due or (run.config.evaluate.at_start and run.resume_step is None):
        evaluate_now(run)
        run.saving.amend()
    while progress.step < run.total_steps and not (run.early_stop and run.early_stop.stopped):
        if progress.evaluation_due:
            return preempt(run)
        agreed = train_step(run, next_micro_batches(run))
        if agreed.stop:
            return preempt(run)
        run.watchdog.heartbeat.first_step_done = True
        run.tracker.progress(progress.step)
        if due.log(progress.step):
            log(run)
        if due.histograms(progress.step):
            draw_histograms(run)
        if due.evaluate(progress.step):
            evaluate_now(run)
        if due.save(progress.step) or agreed.save:
            save(run)
    if progress.evaluation_due:
        return preempt(run)
    return finish(run)


def next_micro_batches(run: Run) -> list[MicroBatch]:
    """This rank's micro-batches of the next step, on the host."""
    run.beat("loading data")
    started = time.perf_counter()
    micro_batches = [next(run.batches) for _ in range(run.plan.accumulation)]
    run.window.data_seconds += time.perf_counter() - started
    return micro_batches


class Agreed(NamedTuple):
    """What all ranks know of a step, alike, before its first gradient."""

    global_count: int
    """Units of the global batch, which its loss is divided by."""
    stop: bool
    """Whether anybody was asked to stop: then the step is given up."""
    save: bool
    """Whether rank 0's clock wants a checkpoint after it."""


def begin_to_agree(run: Run, count: int) -> Callable[[], Agreed]:
    """Tells the other ranks this one's ``count`` and what it was asked; what is returned waits
    for theirs. To wait at once would cost each step as long as the slowest rank is behind."""
    time_to_save = run.engine.is_main and run.due.time_to_save()
    pending = run.engine.begin_sum_ints(
        [count, run.stop.requested, time_to_save, run.saving.failed]
    )

    def wait() -> Agreed:
        run.beat("waiting for other ranks")
        global_count, stop, save, failed = pending()
        if failed:
            run.saving.wait()  # tells of it now, not at the next one
        return Agreed(global_count, stop > 0, save > 0)

    return wait


def train_step(run: Run, micro_batches: Sequence[MicroBatch]) -> Agreed:
    """Forward and backward over the micro-batches, then one step of the optimiser, unless ranks
    agreed on a stop meanwhile: then all is as it was before.

    The gradient is that of (sum of losses over the global batch) / (global count), whatever the
    number of ranks and micro-batches.
    """
    engine, progress, step = run.engine, run.progress, run.progress.step
    if run.config.compile and step == run.start_step:
        batch = engine.to_device(micro_batches[0].batch)
        check_compiled(run.task, engine.bare_model, batch, run.config.precision)
    set_learning_rate(engine.optimizer, run.config.optim.lr, run.learning_rate_factor(step))
    engine.strategy.zero_grad()
    engine.strategy.sync_buffers()
    count = sum(int(run.task.count(micro.batch)) for micro in micro_batches)
    loss_sum = torch.zeros((), device=engine.device)
    for micro in micro_batches:
        # Travels while the forward pass runs.
        agreement = begin_to_agree(run, count)
        run.beat("computing a micro-batch")
        last = micro is micro_batches[-1]
        # Model randomness depends on what is computed, never on who computes it or when.
        position = int(micro.positions[0])
        seed_everything(micro_batch_seed(run.config.run.seed, position), engine.device)
        with engine.strategy.accumulating(last=last):
            started = time.perf_counter()
            loss = run.task.loss(engine.model, engine.to_device(micro.batch))
            run.window.forward_seconds += time.perf_counter() - started
            agreed = agreement()
            if agreed.stop:
                engine.strategy.undo_forward()
                return agreed
            loss_sum += loss.sum.detach()
            if last:  # travels while gradients are computed
                pending_loss = engine.begin_sum(loss_sum)
            run.beat("computing gradients")
            engine.backward(loss.sum, agreed.global_count)
        if step == run.start_step:
            check_count(run, micro, loss.count)
    if step == run.start_step:
        check_unused(run)
    run.beat("taking the optimiser's step")
    result = engine.step(pending_loss, run.config.optim.clip_norm)
    if run.ema:
        run.ema.update(result.skipped)
    if step == run.start_step:
        run.saving.reserve()

    run.saving.record(record(step + 1, progress.position, micro_batches))
    progress.step += 1
    progress.position += run.config.batch.global_batch_size
    run.window.add(result, agreed.global_count)
    # Read at the latest when a streak could have become too long: rarely enough to cost nothing.
    if run.window.unread_steps > run.config.optim.max_skipped_steps:
        read_window(run)
    return agreed


def check_count(run: Run, micro: MicroBatch, count: object) -> None:
    """The task's count must be known before the forward pass, and be the loss's own."""
    expected = int(run.task.count(micro.batch))
    if int(count) != expected:  # type: ignore[call-overload]
        raise UsageError(
            f"The loss of the task {run.config.task.use!r} returned a count of {count}, but its "
            f"count(batch) says {expected} {run.task.unit} for the same batch; make both agree, "
            "since gradients are divided by the sum of count(batch) over all ranks."
        )


def check_unused(run: Run) -> None:
    """Parameters that the loss does not use, where the strategy cannot bear them; collective."""
    strategy = run.engine.strategy
    everywhere = run.engine.gather(strategy.unused())
    unused = sorted({name for names in everywhere for name in names})
    remedy = strategy.unused_remedy(alike=all(names == unused for names in everywhere))
    if unused and remedy:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UsageError(
            f"{', '.join(unused[:5])}{more} got no gradient in the first step, which the strategy "
            f"{run.engine.strategy_name} does not allow for trainable parameters; freeze them "
            f"(requires_grad_(False)), or {remedy}."
        )


def record(step: int, position: int, micro_batches: Sequence[MicroBatch]) -> StepRecord:
    """This rank's part of the ledger's entry for a step."""
    samples = sum(len(micro.positions) for micro in micro_batches)
    digest = sum(micro.digest for micro in micro_batches) % 2**64
    return StepRecord(step, position, samples, digest)


def read_window(run: Run) -> None:
    """Brings losses and norms to the host; too many skipped steps in a row end the run."""
    progress, limit = run.progress, run.config.optim.max_skipped_steps
    results = run.window.read()
    for step, skipped in enumerate(results, start=progress.step - len(results) + 1):
        progress.skipped_steps += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        if progress.skipped_in_a_row > limit:
            raise NotFiniteError(
                f"The loss or the gradient norm was not finite for more than {limit} steps in a "
                f"row, the last of them step {step} (optim.max_skipped_steps is "
                f"{limit}); lower optim.lr, set optim.clip_norm, or look at the data."
            )


def log(run: Run) -> None:
    """One log line for the steps since the last."""
    read_window(run)
    for warning in run.stragglers.look(run):
        run.tracker.warn(warning)
    run.tracker.log(run.progress.step, run.window.metrics())


def draw_histograms(run: Run) -> None:
    """Hands the weights and the (clipped) gradients of the step just taken to the tracker."""
    tensors = run.engine.strategy.full_tensors()
    if run.engine.is_main:
        values = {name: tensor.float().cpu().numpy().copy() for name, tensor in tensors}
        run.tracker.histograms(run.progress.step, values)
    else:
        deque(tensors, maxlen=0)  # to gather them is collective


def evaluate_now(run: Run) -> None:
    """Evaluates (the averaged weights, where there are any) and lets early stopping judge."""
    if run.eval_dataset is None:
        return
    started, progress, engine = time.perf_counter(), run.progress, run.engine

    def stop() -> bool:
        run.beat("evaluating a batch")
        return run.stop.requested

    try:
        engine.strategy.sync_buffers()
        with run.averaged_weights(), run.evaluation_batches() as batches:
            metrics = evaluate(engine, run.task, batches, stop=stop)
            run.beat("reporting")
            seed_everything(run.config.run.seed, engine.device)
            report = run.task.report(engine.bare_model, engine.device)
    except EvaluationStoppedError:
        progress.evaluation_due = True  # a resumed run makes up for it before its next step
        return
    finally:
        run.window.evaluation_seconds += time.perf_counter() - started
    progress.evaluation_due, progress.evaluated = False, metrics
    run.due.evaluated_step = progress.step
    if keep_best := run.config.checkpoint.keep_best:
        metric_value(metrics, keep_best.metric, "checkpoint.keep_best.metric")
    run.tracker.log(progress.step, {f"eval/{name}": value for name, value in metrics.items()})
    run.tracker.report(progress.step, report)
    if run.early_stop:
        run.early_stop.update(metrics)


def save(run: Run) -> None:
    """Starts a checkpoint; what the window holds on the device belongs into it."""
    run.beat("saving")
    read_window(run)
    run.saving.start()


def preempt(run: Run) -> Exit:
    """Saves and says how to go on."""
    save(run)
    run.saving.wait()
    saved = run.saving.last_step
    if saved != run.progress.step:
        raise RetryError(
            f"Stopped at step {run.progress.step}, but no checkpoint of it could be written; "
            f"the run goes on from step {saved or 0} when started again."
        )
    if run.engine.is_main:
        run.directory.mark_stopped()
    launched = run.engine.world.launcher != "python"
    anywhere = ", behind the same launcher, another or none" if launched else ""
    run.tracker.info(
        f"Stopped on request after step {run.progress.step} of {run.total_steps}; it is saved. "
        f"To go on{anywhere}:\n  {run.resume_command}"
    )
    return Exit.PREEMPTED


def finish(run: Run) -> Exit:
    """The last checkpoint, the final numbers, and where everything lies."""
    save(run)
    run.saving.wait()
    if run.saving.last_step != run.progress.step:
        raise RetryError(
            "The run is complete, but its last checkpoint could not be written; make room and "
            "start the same command again."
        )
    run.tracker.summary(run.progress.evaluated)
    if run.engine.is_main:
        run.directory.mark_finished(
            {
                "step": run.progress.step,
                "position": run.progress.position,
                "attempt": run.attempt,
                "time": time.time(),
                "early_stopped": bool(run.early_stop and run.early_stop.stopped),
                "skipped_steps": run.progress.skipped_steps,
                "metrics": run.progress.evaluated,
            }
        )
    run.tracker.info(farewell(run))
    return Exit.DONE
