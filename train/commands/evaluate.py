"""Evaluate a checkpoint on the evaluation data and print the metrics.

Runs on one process, or on several that torchrun or accelerate launch start, with the same result.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from train.artifacts.runs import ReceivedRuns
from train.command_line import say
from train.commands.arguments import add_checkpoint_argument, add_config_arguments
from train.commands.checkpoints import find_checkpoint, load_full_model, local_checkpoint
from train.config.load import LoadedConfig
from train.exits import Exit, RetryError, UsageError, sys_exit_refused
from train.json_files import is_count
from train.json_text import json_text

_USED = (
    "task", "model", "data", "ema", "run.seed", "batch", "precision", "deterministic", "strategy",
    "strategy_options", "evaluate.micro_batch_size", "loader", "watchdog", "checkpoint.keep_best",
)  # fmt: skip
"""The sections and fields of the config that an evaluation uses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    add_checkpoint_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON line")


def run(arguments: argparse.Namespace) -> Exit:
    """Prints the metrics, on rank 0."""
    with local_checkpoint(arguments) as (loaded, checkpoint, received):
        evaluated = evaluate_checkpoint(
            loaded, checkpoint, other_data=arguments.other_data, received=received
        )
    if evaluated.is_main and arguments.json:
        say(json_text({"checkpoint": evaluated.name, **evaluated.metrics}))
    elif evaluated.is_main:
        say(f"{evaluated.name} on {evaluated.samples:,} samples")
        for name, value in evaluated.metrics.items():
            say(f"  {name:<20} {value:.6g}")
    return Exit.DONE


class Evaluated(NamedTuple):
    """An evaluation of one checkpoint, the same on every rank."""

    name: str
    """The path of the checkpoint, or the artifact that it came from."""
    samples: int
    metrics: dict[str, float]
    is_main: bool


@sys_exit_refused()
def evaluate_checkpoint(
    loaded: LoadedConfig,
    which: str,
    *,
    other_data: bool = False,
    received: ReceivedRuns | None = None,
) -> Evaluated:
    """Evaluates the checkpoint that ``which`` names on all evaluation data; collective.
    ``other_data``: accepts another data section than that of the run. ``received``: the runs that
    this rank has downloaded."""
    checkpoint = find_checkpoint(loaded, which, other_data=other_data, used=_USED)
    from train.checkpoint.run_directory import RunDirectory
    from train.data.plan import BatchPlan
    from train.loop.evaluate import evaluate
    from train.setup.build import (
        build_engine,
        build_evaluation_batches,
        choose_strategy,
        evaluation_data,
    )
    from train.strategies.model_call import ModelCall

    config = loaded.config
    engine = build_engine(config, choose_strategy(loaded))
    with ExitStack() as stack:
        stack.push(engine.leave)
        artifact = received.name_of(checkpoint) if received else None
        if artifact:  # each rank has its own copy
            _check_same(engine.collectives.all_gather_object(artifact))
        else:  # while the run is training, ranks may see different newest checkpoints
            checkpoint = Path(engine.collectives.broadcast_object(str(checkpoint)))
        task = loaded.task(config)
        dataset = evaluation_data(task, config.run.seed, engine.device)
        if dataset is None:
            raise UsageError(
                f"The task {config.task.use!r} has no evaluation data; implement eval_dataset()."
            )
        model = load_full_model(task, checkpoint, loaded)
        model = engine.on_device(model)
        plan = BatchPlan.from_config(config.batch, engine.world_size)
        # The run may have found that less fits into memory than this rank's share of a batch.
        of_run = RunDirectory(loaded.run_directory).attempts.last().get("micro_batch_size")
        size = plan.largest_micro_batch
        if is_count(of_run) and of_run:
            size = min(size, of_run)
        with build_evaluation_batches(config, task, dataset, size, engine) as batches:
            call = ModelCall(model, engine.autocast)
            through = partial(call.through, call)
            metrics = evaluate(engine, through, model, task, batches, seed=config.run.seed)
        return Evaluated(artifact or str(checkpoint), len(dataset), metrics, engine.is_main)


def _check_same(artifacts: list[str]) -> None:
    if len(set(artifacts)) > 1:
        raise RetryError(
            f"The alias was moved while the ranks downloaded it: one has {artifacts[0]}, another "
            f"{next(name for name in artifacts if name != artifacts[0])}; rerun."
        )
