"""The loop: one pass per optimiser step, until the run is complete or is asked to stop."""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext

from train.data.fetch import MicroBatch
from train.data.ledger import Skip
from train.exits import Exit, NotFiniteError, RollbackError, SpikeError
from train.loop.early_stop import metric_value
from train.loop.first_step import FirstStepChecks
from train.loop.report import report_end, report_start
from train.loop.run import OpenRun
from train.loop.train_step import StepTaken


def fit(run: OpenRun) -> Exit:
    """Trains from the present step to the end of the run. Returns how it ended."""
    report_start(run)
    run.goodput.clock.enter("compute")
    progress, triggers = run.progress, run.triggers
    run.beat("calling hooks")
    run.hooks.run_start(progress.step, progress.position)
    at_start = run.loaded.config.evaluate.at_start and run.attempt.resume_step is None
    if progress.evaluation_due or at_start:
        evaluate(run)
    checks: FirstStepChecks | None = run.first_step
    if run.recorder:
        run.recorder.start(progress.step)
    while progress.step < run.data.total_steps and not run.stopped_early:
        if progress.evaluation_due:
            return preempt(run)
        micro_batches = next_micro_batches(run)
        compiles = checks is not None and run.loaded.config.compile
        with run.goodput.clock.counted_as("compile") if compiles else nullcontext():
            taken = take_step(run, micro_batches, checks)
        if taken is None:
            return preempt(run)
        if checks:
            run.checkpointing.reserve()
            checks = None
        record_step(run, micro_batches, taken)
        if triggers.log(progress.step):
            log(run)
        run.beat("calling hooks")
        run.hooks.step_end(progress.step, progress.position)
        run.hooks.checkpoint(run.checkpointing.last_path)
        if triggers.histograms(progress.step):
            track_histograms(run)
        save_and_evaluate(run, taken)
        if run.recorder:
            run.beat("profiling")
            run.recorder.step_end()
    if progress.evaluation_due:
        return preempt(run)
    return finish(run)


def take_step(
    run: OpenRun, micro_batches: list[MicroBatch], checks: FirstStepChecks | None
) -> StepTaken | None:
    """Takes the next step; None where the ranks agreed to stop before it."""
    taken = run.train_step.take(micro_batches, run.progress.step, checks)
    if taken is None and at_spike(run):
        end_at_spike(run)
        taken = run.train_step.take(micro_batches, run.progress.step, checks)
    return taken


def save_and_evaluate(run: OpenRun, taken: StepTaken) -> None:
    """Saves and evaluates where it is due after a step."""
    progress, triggers = run.progress, run.triggers
    due = triggers.evaluate(progress.step, progress.position)
    evaluates = due and run.evaluation is not None
    saves = triggers.save(progress.step) or taken.agreed.save
    complete = progress.step == run.data.total_steps
    # Before the evaluation, which the checkpoint gets later: if it fails, or if the run ends at a
    # spike, no step is lost, and the next start begins with the evaluation.
    progress.evaluation_due = evaluates
    if (saves or evaluates or complete) and at_spike(run):
        end_at_spike(run)
    if saves or (evaluates and complete):
        save(run)
    if evaluates:
        evaluate(run)


def next_micro_batches(run: OpenRun) -> list[MicroBatch]:
    """This rank's micro-batches of the next step, on the host."""
    run.beat("loading data")
    with run.metrics.timed("data"):
        return [next(run.batches) for _ in range(run.plan.accumulation)]


def record_step(run: OpenRun, micro_batches: list[MicroBatch], taken: StepTaken) -> None:
    """Counts a completed step, and its samples for the ledger."""
    progress = run.progress
    run.checkpointing.record(progress.step + 1, progress.position, micro_batches)
    progress.advance(run.plan.global_batch_size)
    run.data_watch.step(progress.step, taken.agreed.global_count)
    run.metrics.add(taken.result, taken.agreed.global_count, taken.learning_rate)
    # Read before too many skipped steps in a row can go unnoticed: rarely enough to cost nothing.
    if run.metrics.unread_steps > run.loaded.config.optim.max_skipped_steps:
        read_metrics(run)
    run.joined.heartbeat.complete_step()
    run.tracker.progress(progress.step)


def read_metrics(run: OpenRun) -> None:
    """Copies losses and norms to the host. Raises NotFiniteError after too many skipped steps."""
    steps, progress = run.metrics.read(), run.progress
    not_finite = 0
    for step, skipped in enumerate(steps, start=progress.step - len(steps) + 1):
        if skipped:
            run.checkpointing.record_skip(step, skipped.why)
            not_finite += skipped.why == Skip.NOT_FINITE
        if skipped and skipped.why == Skip.SPIKE:
            run.tracker.warn(f"Step {step} is a spike and was skipped: {skipped.text}.")
    progress.record_skipped(steps, run.loaded.config.optim.max_skipped_steps)
    if not_finite:
        run.tracker.event(
            f"{not_finite} of the last steps skipped: loss or gradient norm not finite."
        )


def log(run: OpenRun) -> None:
    """One log line for the steps since the last; collective."""
    read_metrics(run)
    if run.engine.world_size > 1:
        with run.metrics.timed("wait"):
            seconds = run.engine.collectives.all_gather_floats(run.metrics.own_seconds)
        for warning in run.stragglers.compare(seconds):
            run.tracker.warn(warning)
    run.directory.ensure_in_place()
    metrics = run.metrics.compute(run.progress)
    run.tracker.log(run.progress.step, metrics)
    run.hooks.logged(metrics)


def track_histograms(run: OpenRun) -> None:
    """Tracks the weights and the clipped gradients of the step just taken; collective."""
    tensors = run.model.strategy.full_tensors()
    if run.engine.is_main:
        values = {name: tensor.float().cpu().numpy().copy() for name, tensor in tensors}
        run.tracker.histograms(run.progress.step, values)
    else:
        deque(tensors, maxlen=0)  # gathering them is collective


def evaluate(run: OpenRun) -> None:
    """Evaluates the model, or its average of weights, where the task has evaluation data; early
    stopping judges the metrics. Collective."""
    if run.evaluation is None:
        return
    progress = run.progress
    run.tracker.begin_evaluation(progress.step)
    try:
        with run.metrics.timed("evaluation"):
            result = run.evaluation.run()
        if result is None:
            progress.evaluation_due = True  # a resumed run evaluates before its next step
            return
        if keep_best := run.loaded.config.checkpoint.keep_best:
            metric_value(result.metrics, keep_best.metric, "checkpoint.keep_best.metric")
        if run.early_stop:
            run.early_stop.update(result.metrics)
    except BaseException:
        if run.checkpointing.started_step == progress.step:
            run.tracker.warn(
                f"The evaluation of step {progress.step} failed. The step was saved before, so no "
                "step is lost; the next start begins with this evaluation."
            )
        raise
    progress.record_evaluation(result.metrics)
    run.directory.ensure_in_place()
    metrics = {f"eval/{name}": value for name, value in result.metrics.items()}
    run.tracker.log(progress.step, metrics)
    run.tracker.report(progress.step, result.report)
    run.tracker.end_evaluation()
    run.hooks.evaluation(metrics)
    run.goodput.flush_soon()
    if run.checkpointing.started_step == progress.step:
        wait_for_checkpoint(run)
        run.checkpointing.amend(progress, run.early_stop)


def save(run: OpenRun) -> None:
    """Starts a checkpoint, which includes the metrics that are still on the device."""
    run.beat("saving")
    run.data_watch.lengths()
    read_metrics(run)
    wait_for_checkpoint(run)  # the one before
    run.goodput.saving(run.progress.step)
    if run.checkpointing.start(run.progress, run.metrics, run.early_stop, run.spikes):
        run.triggers.checkpoint_started()


def wait_for_checkpoint(run: OpenRun) -> None:
    """Returns when the checkpoint in flight is committed or has failed, and tells the hooks."""
    with run.metrics.timed("checkpoint"):
        run.checkpointing.wait()
    run.hooks.checkpoint(run.checkpointing.last_path)


def save_and_wait(run: OpenRun) -> bool:
    """Writes a checkpoint of the present step; whether it is committed."""
    save(run)
    wait_for_checkpoint(run)
    return run.checkpointing.last_step == run.progress.step


def at_spike(run: OpenRun) -> bool:
    """Whether the step just taken is a spike at which the attempt ends; the same on all ranks."""
    return run.spikes is not None and run.spikes.ends_run()


def end_at_spike(run: OpenRun) -> None:
    """Raises SpikeError, after a checkpoint, or RollbackError, after a record in the ledger.
    Returns where the run cannot go back, as there is no checkpoint yet: the step is only skipped.
    """
    assert run.spikes is not None
    step = run.progress.step
    if run.spikes.rolls_back:
        roll_back(run)
        run.spikes.go_on()
        return
    if not save_and_wait(run):
        raise run.checkpointing.error(
            f"Step {step} is a spike, but its checkpoint could not be written",
            f"rerun to resume from step {run.checkpointing.last_step or 0}",
        )
    raise SpikeError(
        f"Step {step} is a spike (optim.spike.action is stop), so it was skipped and the run ends; "
        f"it is saved. To look at the step: {run.loaded.command('replay')} --step "
        f"{step}. Rerun to go on after it, or add --allow-changes to go on with other values."
    )


def roll_back(run: OpenRun) -> None:
    """Raises RollbackError if there is a checkpoint, or NotFiniteError after too many of them."""
    step, limit = run.progress.step, run.loaded.config.optim.max_skipped_steps
    read_metrics(run)
    wait_for_checkpoint(run)
    found = run.checkpointing.leave_out(step, run.progress.position)
    if found is None:
        run.tracker.warn(f"There is no checkpoint before step {step} to go back to.")
        return
    left_out, times = found
    if times > max(limit, 1):
        raise NotFiniteError(
            f"Step {step} is a spike, and the run has gone back to step {left_out.step} "
            f"{times - 1} times already (optim.max_skipped_steps is {limit}); lower optim.lr, set "
            "optim.clip_norm, or check the data."
        )
    text = (
        f"Step {step} is a spike, so the run goes back to the checkpoint of step {left_out.step} "
        f"and leaves out positions {left_out.start_position} to {left_out.end_position - 1}"
    )
    run.tracker.event(f"{text}.")
    raise RollbackError(
        f"{text}. To look at the step: {run.loaded.command('replay')} --step {step} --attempt "
        f"{run.attempt.number}. Rerun to go on from the checkpoint, as launchers do."
    )


def preempt(run: OpenRun) -> Exit:
    """Saves, and reports how to resume."""
    step = run.progress.step
    if not save_and_wait(run):
        raise run.checkpointing.error(
            f"Stopped at step {step}, but its checkpoint could not be written",
            f"rerun to resume from step {run.checkpointing.last_step or 0}",
        )
    run.goodput.clock.enter("shutdown")
    run.goodput.ended(Exit.PREEMPTED)
    run.tracker.end(Exit.PREEMPTED)
    if run.engine.is_main:
        run.directory.mark_stopped()
        run.directory.record_end(run.attempt.number, Exit.PREEMPTED, f"stopped at step {step}")
    launched = run.engine.world.launcher != "python"
    anywhere = " (by the same launcher, another or none)" if launched else ""
    run.tracker.event(f"Stopped on request after step {step}; it is saved.")
    run.tracker.info(
        f"Stopped on request after step {step} of {run.data.total_steps}; it is saved. To resume"
        f"{anywhere}:\n  {run.resume_command}"
    )
    run.hooks.run_end(Exit.PREEMPTED)
    return Exit.PREEMPTED


def finish(run: OpenRun) -> Exit:
    """Writes the last checkpoint, and reports the final metrics and where the files are."""
    progress = run.progress
    read_metrics(run)
    progress.ensure_trained()
    if not save_and_wait(run):
        remedy = "free some space" if run.checkpointing.lacks_space else "fix the cause"
        raise run.checkpointing.error(
            "The run is complete, but its last checkpoint could not be written",
            f"{remedy}, then rerun",
        )
    run.goodput.clock.enter("shutdown")
    run.goodput.ended(Exit.DONE)
    so_far = run.goodput.so_far()
    goodput = so_far.summary() if so_far else {}
    named = {f"goodput/{name}": value for name, value in goodput.items()}
    run.tracker.summary({**progress.evaluated, **named})
    if run.engine.is_main:
        run.directory.mark_finished(
            {
                "run": run.attempt.identity.id,
                "step": progress.step,
                "position": progress.position,
                "attempt": run.attempt.number,
                "time": time.time(),
                "early_stopped": run.stopped_early,
                "skipped_steps": progress.skipped_steps,
                "spikes": progress.spikes,
                "metrics": progress.evaluated,
                "goodput": goodput,
            }
        )
        end = f"finished at step {progress.step}"
        run.directory.record_end(run.attempt.number, Exit.DONE, end)
    run.tracker.end(Exit.DONE)
    run.tracker.wait_until_open()
    run.tracker.info(report_end(run))
    run.hooks.run_end(Exit.DONE)
    return Exit.DONE
