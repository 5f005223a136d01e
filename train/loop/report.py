"""What a run says to the person in front of it when it starts and when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from train.config.load import python

if TYPE_CHECKING:
    from train.loop.run import Run


def announce(run: Run) -> None:
    """Who the run is, where it runs, what it computes, and the model."""
    config, engine, plan = run.config, run.engine, run.plan
    progress = run.progress
    how = f"goes on from step {progress.step}" if run.resume_step is not None else "starts"
    run.tracker.info(f"Run {run.identity.id} {how} (attempt {run.attempt}) in {run.directory.path}")
    for change in run.changes:
        mark = "changes results" if change.changes_results else "harmless"
        run.tracker.info(f"  config changed ({mark}): {change}")
    run.tracker.info(
        f"Placement: {placement(run)}, {config.precision}; "
        f"micro-batch {plan.largest_micro_batch} x "
        f"accumulation {plan.accumulation} x ranks {engine.world_size} = "
        f"global batch {config.batch.global_batch_size}"
    )
    evaluation = f", {len(run.eval_dataset):,} to evaluate on" if run.eval_dataset else ""
    run.tracker.info(
        f"Data: {len(run.train_dataset):,} samples{evaluation}; {run.total_steps:,} steps = "
        f"{run.total_steps * config.batch.global_batch_size / len(run.train_dataset):.2f} epochs"
    )
    if facts := run.task.facts():
        run.tracker.info("Facts: " + "  ".join(f"{k} {v:,.6g}" for k, v in facts.items()))
    run.tracker.info(run.model_summary)


def placement(run: Run) -> str:
    """Ranks, devices, hosts, how they talk and how the model is spread."""
    engine = run.engine
    device = engine.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(engine.device)
    text = f"{engine.world_size} x {device}"
    if engine.world_size > 1:
        hosts = list(dict.fromkeys(run.hosts))
        named = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
        text += f" on {len(hosts)} host{'s' if len(hosts) > 1 else ''} ({named})"
        text += f" over {dist.get_backend()}, started by {engine.world.launcher}"
    return text if engine.strategy_name == "single" else f"{text}, {engine.strategy_name}"


def farewell(run: Run) -> str:
    """The final numbers, where everything lies, and what to do with it."""
    progress, path = run.progress, run.directory.path
    early = " (early stop)" if run.early_stop and run.early_stop.stopped else ""
    lines = [f"Finished: {progress.step} steps{early}, {progress.position:,} samples."]
    if progress.evaluated:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in progress.evaluated.items())
        lines.append(f"  evaluation    {numbers}")
    if facts := run.task.facts():
        lines.append("  to compare    " + "  ".join(f"{k} {v:,.6g}" for k, v in facts.items()))
    if progress.skipped_steps:
        lines.append(f"  skipped       {progress.skipped_steps} steps that were not finite")
    lines += [
        f"  checkpoints   {run.directory.checkpoints}",
        f"  metrics       {run.directory.metrics}",
    ]
    if run.config.track.tensorboard:
        logs = path / "tensorboard"
        lines.append(f"  TensorBoard   {python()} -m tensorboard.main --logdir {logs}")
    if run.config.track.wandb != "disabled":
        lines.append(f"  W&B           {path / 'wandb'}")
    lines += [
        f"  resume        {run.resume_command}",
        f"  check         {run.loaded.command('verify')}",
        f"  export        {run.loaded.command('export')}",
    ]
    return "\n".join(lines)
