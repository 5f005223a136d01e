"""The settings of a study, checked before anything starts or is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.contract import Space, UsageError, check_space, depends_on_length, load_space
from launch.tune.methods import check_method, is_grid
from launch.tune.settings import Settings, parse_objectives


def checked_settings(
    space_file: str,
    files: Sequence[str],
    overrides: Sequence[str],
    *,
    objectives: Sequence[str],
    sampler: str,
    pruner: str,
    world_size: int,
) -> Settings:
    """The settings by the words of a command line. ``world_size``: ranks of a trial. Raises
    UsageError."""
    sampler_name = check_method("sampler", sampler)
    pruner_name = check_method("pruner", pruner)
    space = load_space(space_file)
    base = check_space(space, files, overrides, world_size)
    found = parse_objectives(objectives, base.values())
    _check_evaluations(base.config.evaluate, pruner_name, len(found))
    if sampler_name == "wandb":
        _check_sweep(space, base.config.track.wandb, pruner_name, len(found))
    if is_grid(sampler):
        space.grid()  # refuses ranges without a step, before the study exists
    return Settings(space, found, sampler, pruner, base)


def length_dependent_schedule(settings: Settings) -> str:
    """The first schedule of the trials that depends on the length of the run; empty without one."""
    uses = [settings.base.config.schedule.use]
    for each in settings.space.dimensions:
        if each.key == "schedule.use":
            uses = [str(choice) for choice in each.extremes]
    return next((use for use in uses if depends_on_length(use)), "")


def _check_evaluations(evaluate: Any, pruner: str, objectives: int) -> None:
    """Raises UsageError if trials would not report what the study needs. ``evaluate``: the section
    of the config."""
    during = evaluate.every_steps or evaluate.every_epochs
    if not during and not evaluate.at_end:
        raise UsageError(
            "The config has no evaluation, so trials report no objective; set evaluate.at_end=true."
        )
    if pruner == "none":
        return
    if objectives > 1:
        raise UsageError(
            f"--pruner is {pruner!r}, but a study with {objectives} objectives cannot prune "
            "trials; leave the option out, or name one objective."
        )
    if not during:
        raise UsageError(
            f"--pruner is {pruner!r}, but the config evaluates only at the end of a run; set "
            "evaluate.every_steps or evaluate.every_epochs."
        )


def _check_sweep(space: Space, mode: str, pruner: str, objectives: int) -> None:
    """Raises UsageError for what a W&B sweep cannot do. ``mode``: track.wandb."""
    if objectives > 1:
        raise UsageError(
            f"The study has {objectives} objectives, but a W&B sweep has one; name one "
            "--objective, or use another --sampler."
        )
    if pruner == "halving":
        raise UsageError(
            "--pruner is 'halving', whose trials pause, but W&B does not let the runs of a sweep "
            "pause; use another --pruner, or another --sampler."
        )
    for each in space.dimensions:
        if each.when:
            raise UsageError(
                f"{each.key} has conditions (when, {each.where}), which a W&B sweep does not have; "
                "remove them, or use another --sampler."
            )
    if mode not in ("auto", "online"):
        raise UsageError(
            f"track.wandb is {mode!r}, but the runs of a W&B sweep must be at W&B; set "
            "track.wandb=online, or use another --sampler."
        )
