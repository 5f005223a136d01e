"""What a run reports to the user when it starts and when it ends."""

from __future__ import annotations

import shlex

import torch
import torch.distributed as dist

from train.checkpoint.run_directory import RunDirectory
from train.loop.run import OpenRun
from train.program import python
from train.setup.micro_batch_effects import dropout_note
from train.strategies.engine import Engine
from train.tasks.checked import facts_of


def report_start(run: OpenRun) -> None:
    """Reports the run's identity, its placement, its data and its model."""
    config, plan, say = run.loaded.config, run.plan, run.tracker.info
    directory = run.loaded.run_directory_as_set
    attempt, data = run.attempt, run.data
    resumed = attempt.resume_step is not None
    how = f"resumes at step {run.progress.step}" if resumed else "starts"
    say(f"Run {attempt.identity.id} {how} (attempt {attempt.number}) in {directory}")
    for change in attempt.changes:
        effect = "changes results" if change.changes_results else "does not change results"
        say(f"  config changed ({effect}): {change}")
    placement = describe_placement(run.engine, run.joined.hosts, run.model.strategy.setup.name)
    say(
        f"Placement: {placement}, {config.precision}; micro-batch {plan.largest_micro_batch} x "
        f"accumulation {plan.accumulation} x ranks {run.engine.world_size} = "
        f"global batch {plan.global_batch_size}"
    )
    is_auto = config.batch.micro_batch_size == "auto" and attempt.number == 1
    if is_auto and (note := dropout_note(plan, run.model.strategy.bare_model)):
        say(note)
    evaluation = f", {len(data.evaluation):,} to evaluate on" if data.evaluation else ""
    left = data.total_steps - run.progress.step
    samples = run.progress.position + left * plan.global_batch_size
    say(
        f"Data: {len(data.train):,} samples{evaluation}; {data.total_steps:,} steps = "
        f"{samples / len(data.train):.2f} epochs"
    )
    if facts := facts_of(run.task):
        say("Facts: " + "  ".join(f"{k} {v:,.6g}" for k, v in facts.items()))
    if run.initial:
        say(run.initial.text)
    say(run.model.summary)


def describe_placement(engine: Engine, hosts: list[str], strategy: str) -> str:
    """Ranks, devices, hosts, the backend and the strategy, in one line."""
    device = engine.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(engine.device)
    text = f"{engine.world_size} x {device}"
    if engine.world_size > 1:
        distinct = list(dict.fromkeys(hosts))
        named = ", ".join(distinct[:4]) + (", ..." if len(distinct) > 4 else "")
        text += f" on {len(distinct)} host{'s' if len(distinct) > 1 else ''} ({named})"
        text += f" over {dist.get_backend()}, started by {engine.world.launcher}"
    return text if strategy == "single" else f"{text}, {strategy}"


def report_end(run: OpenRun) -> str:
    """The final metrics, where the files are, and commands to continue with."""
    progress, path = run.progress, run.loaded.run_directory_as_set
    directory = RunDirectory(path)
    early = " (early stop)" if run.stopped_early else ""
    lines = [f"Finished: {progress.step} steps{early}, {progress.position:,} samples."]
    if progress.evaluated:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in progress.evaluated.items())
        lines.append(f"  evaluation    {numbers}")
    if facts := facts_of(run.task):
        lines.append("  to compare    " + "  ".join(f"{k} {v:,.6g}" for k, v in facts.items()))
    if progress.skipped_steps:
        spikes = f", {progress.spikes} of them spikes" if progress.spikes else ""
        lines.append(f"  skipped       {progress.skipped_steps} steps without an update{spikes}")
    lines += [
        f"  checkpoints   {directory.checkpoints}",
        f"  metrics       {directory.metrics}",
    ]
    if run.loaded.config.track.tensorboard:
        logs = shlex.quote(str(path / "tensorboard"))
        lines.append(f"  TensorBoard   {python()} -m tensorboard.main --logdir {logs}")
    if run.loaded.config.track.wandb != "disabled":
        lines.append(f"  W&B           {path / 'wandb'}")
    lines += [
        f"  check         {run.loaded.command('verify')}",
        f"  export        {run.loaded.command('export')}",
    ]
    return "\n".join(lines)
