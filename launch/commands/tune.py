"""Search for good values of config keys. Each trial is an ordinary run, with any number of ranks.

The same command, repeated, goes on with the study in its directory (run.dir): after a stop, a crash
or kill -9, unfinished trials resume, and no trial is lost or run twice. Several of these commands
may work on one study at the same time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands.trial_place import number, place_of
from launch.contract import (
    Exit,
    UsageError,
    import_extra,
    log,
    path_word,
    say,
    terminal_width,
    this_world,
)

if TYPE_CHECKING:
    from launch.tune.controller import Plan
    from launch.tune.stored_study import StoredStudy
    from launch.tune.study import Study

_TRIALS = 20
_RETRIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add = parser.add_argument
    add(
        "--config", action="append", type=path_word, default=[], metavar="FILE",
        help="a YAML config file of all trials; repeatable, later ones take precedence",
    )  # fmt: skip
    add(
        "--space",
        type=path_word,
        metavar="FILE",
        help="a YAML file with the keys to vary (docs/tuning.md)",
    )
    add(
        "--trials", metavar="N",
        help=f"trials of the study in all, those of earlier starts included (default {_TRIALS}; "
        "with --sampler grid all combinations)",
    )  # fmt: skip
    add(
        "--objective", action="append", default=[], metavar="NAME[:min|max]",
        help="evaluation metric to optimise; repeatable; default: that of checkpoint.keep_best or "
        "early_stop, else loss",
    )  # fmt: skip
    add(
        "--sampler", metavar="NAME",
        help="tpe (default), random, grid, gp or nsgaii, with Optuna's options as "
        "NAME:option=value,...; or wandb:method=NAME, a sweep of W&B (bayes, random or grid)",
    )  # fmt: skip
    add("--wandb", action="store_true", help="the same as --sampler wandb: W&B chooses the values")
    add(
        "--pruner", default="none", metavar="NAME",
        help="none (default), median, percentile, successive_halving, hyperband or threshold, with "
        "Optuna's options as NAME:option=value,...; or halving:min_steps=N, whose trials pause and "
        "go on from their checkpoints",
    )  # fmt: skip
    add(
        "--storage", metavar="WHERE",
        help="journal (default) or sqlite for a file in the study's directory, or the URL of a "
        "database",
    )  # fmt: skip
    add("--parallel", default="1", metavar="K", help="trials at a time (default 1)")
    add("--processes", metavar="N", help="ranks of each trial, on this machine (default 1)")
    add(
        "-s", "--scheduler", metavar="NAME",
        help="submit each trial as a job of isorun.fit to this scheduler of TorchX, such as slurm "
        "or kubernetes_job; default: this machine",
    )  # fmt: skip
    add(
        "-j", metavar="NODESxPROCESSES",
        help="nodes and processes of each trial, such as 2x8; more than one node needs --scheduler",
    )  # fmt: skip
    add("-cfg", "--cfg", metavar="KEY=VALUE,...", help="options of the scheduler (torchx runopts)")
    add(
        "--job", action="append", default=[], metavar="NAME=VALUE",
        help="a further argument of isorun.fit for the jobs, such as h=gpu_h100_8 or image=NAME; "
        "repeatable",
    )  # fmt: skip
    add(
        "--retries", default=str(_RETRIES), metavar="N",
        help="further starts of a trial that the infrastructure ended: exit code 75, or killed "
        f"(default {_RETRIES})",
    )  # fmt: skip
    add("--show", metavar="STUDY", help="print the table of the study in this directory, and end")
    add(
        "--to", type=path_word, metavar="FILE",
        help="write the result as an HTML page to this file; default: study.html in the study's "
        "directory, or none with --show",
    )  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")
    add(
        "overrides", nargs="*", default=[], metavar="key=value",
        help="values for all trials that take precedence over the files; run.dir is the directory "
        "of the study",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Exit:
    """Runs trials until the study has enough, and prints the result."""
    import_extra("optuna", "tune", "tune")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.show is not None:
        return _show(arguments)
    return _tune(arguments)


def _tune(arguments: argparse.Namespace) -> Exit:
    from launch.agent.signals import Signals
    from launch.contract import check_target
    from launch.tune.checked import checked_settings, length_dependent_schedule
    from launch.tune.controller import Controller, Plan
    from launch.tune.study import Study
    from launch.tune.wandb_sweep import SweepAgents, sweep_url

    if this_world().world_size > 1:
        raise UsageError(
            "tune starts the ranks of its trials itself, but this process is one of "
            f"{this_world().world_size} ranks (WORLD_SIZE); start it alone, with --processes."
        )
    if arguments.space is None:
        raise UsageError("tune needs --space FILE, with the keys to vary; see docs/tuning.md.")
    parallel = number("parallel", arguments.parallel, 1)
    where = place_of(arguments)
    retries = number("retries", arguments.retries, 0)
    wanted = None if arguments.trials is None else number("trials", arguments.trials, 1)
    if arguments.to:
        check_target(Path(arguments.to))
    sampler = _sampler(arguments)
    settings = checked_settings(
        arguments.space, arguments.config, arguments.overrides, objectives=arguments.objective,
        sampler=sampler, pruner=arguments.pruner, world_size=where.world_size,
    )  # fmt: skip
    space, base, objectives = settings.space, settings.base, settings.objectives
    overrides = [
        word for word in arguments.overrides if not word.startswith(("run.dir=", "run.name="))
    ]
    signals = Signals()
    signals.interruptible = lambda: False
    signals.install()
    name = base.config.run.name
    backend = where.backend(parallel, name, base.run_directory)
    first = [*overrides, *space.overrides(space.extremes()[0]), f"run.dir={base.run_directory}"]
    backend.check(arguments.config, first)
    study = Study(base.run_directory, settings, arguments.storage)
    combinations = study.combinations
    count = wanted or (_TRIALS if combinations is None else len(combinations))
    if combinations is not None:
        count = min(count, len(combinations))
    tell = log if arguments.json else say
    tell(
        f"Study in {base.run_directory_as_set}: {count} trials, "
        f"{', '.join(map(str, objectives))}, sampler {sampler}, pruner "
        f"{arguments.pruner}; {parallel} at a time, {where}"
    )
    if study.halving is not None and (schedule := length_dependent_schedule(settings)):
        tell(
            f"The schedule {schedule} depends on the length of the run: trials pause on the way to "
            "their whole length, with the learning rates of a whole run, and what they reach at a "
            "rung is not what a run of that length reaches."
        )
    plan = Plan(arguments.config, overrides, name, count, retries)
    agents = SweepAgents(study.sweep, parallel) if study.sweep else None
    if study.sweep:
        tell(f"W&B sweep: {sweep_url(study.sweep)}")
    try:
        stopped = Controller(study, plan, backend, signals, tell, agents).run()
    finally:
        if agents:
            agents.close()
    if agents and agents.exhausted:
        tell("W&B has no more runs for this sweep.")
    return _report(study, plan, arguments, stopped=stopped)


def _sampler(arguments: argparse.Namespace) -> str:
    """The sampler by --sampler and --wandb."""
    given: str | None = arguments.sampler
    if not arguments.wandb or (given or "").partition(":")[0] == "wandb":
        return given or "tpe"
    from launch.tune.sweep_config import METHODS

    if given is not None and given not in METHODS:
        raise UsageError(
            f"--sampler is {given!r}, but with --wandb it must be one of {', '.join(METHODS)}; "
            "correct it, or leave --wandb out."
        )
    return f"wandb:method={given or METHODS[0]}"


def _report(study: Study, plan: Plan, arguments: argparse.Namespace, *, stopped: bool) -> Exit:
    from launch.tune.page import PAGE_FILE, write_page
    from launch.tune.result import write_best

    _print(study, as_json=arguments.json)
    trials = study.trials()
    tell = log if arguments.json else say
    best = write_best(study, plan.files, plan.overrides)
    if best is not None:
        tell(f"Best config: {best}")
    page = Path(arguments.to or study.directory / PAGE_FILE)
    try:
        write_page(study, page)
        tell(f"Page: {page}")
    except UsageError as error:  # what the trials have found is kept in any case
        log(f"warning: {error}")
    open_trials = [each.number for each in trials if not each.state.is_finished()]
    if stopped or open_trials:
        what = f"{len(trials) - len(open_trials)} of {plan.trials} trials have ended"
        tell(f"{'Stopped' if stopped else 'Other processes work on the study'}: {what}; the same "
             "command goes on.")  # fmt: skip
    if stopped:
        return Exit.PREEMPTED
    if best or open_trials:
        return Exit.DONE
    codes = [each.user_attrs.get("exit_code") for each in trials]
    return next((Exit(code) for code in codes if code and code in set(Exit)), Exit.INTERNAL)


def _show(arguments: argparse.Namespace) -> Exit:
    from launch.contract import check_target
    from launch.tune.page import write_page
    from launch.tune.stored_study import open_stored

    target = Path(arguments.to) if arguments.to else None
    if target is not None:
        check_target(target)
    study = open_stored(Path(arguments.show), arguments.storage)
    _print(study, as_json=arguments.json)
    if target is not None:
        write_page(study, target)
        (log if arguments.json else say)(f"Page: {target}")
    return Exit.DONE


def _print(study: StoredStudy, *, as_json: bool) -> None:
    from launch.tune.result import table, to_json

    if as_json:
        print(json.dumps(to_json(study), indent=1))
        return
    for line in table(study, terminal_width()):
        say(line)
