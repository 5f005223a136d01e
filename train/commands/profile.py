"""Show what a step spends its time on: operators, and the share of data, compute and others.

With a config: takes some steps with its model, data, optimiser and placement, on one process or on
several that torchrun or accelerate launch start, and records them with torch.profiler. No run
directory is read or written. With the directory of a run that has traces, from the section
`profile` of its config: shows the newest of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.damage import refused_files
from train.checkpoint.run_directory import RunDirectory
from train.command_line import say
from train.commands.arguments import add_config_arguments, config_words
from train.config.load import load_config
from train.exits import Exit, RunError, UsageError, sys_exit_refused
from train.files import replace_text
from train.json_text import json_text
from train.paths import path_argument
from train.process.cleanup import temporary_directory
from train.process.diagnose import written_to
from train.profiling.files import Trace, find_traces, place_copy, trace_name
from train.profiling.table import table, to_json
from train.profiling.trace import Profile, read_profile

if TYPE_CHECKING:
    from train.diagnosis.bench import Bench
    from train.profiling.profile_config import ProfileConfig

JSON_FILE = "profile.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    parser.add_argument("--steps", type=int, default=3, help="steps to record; default: 3")
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps before them, which are slower; default: 3"
    )
    parser.add_argument("--top", type=int, default=15, help="operators to show; default: 15")
    parser.add_argument(
        "--to",
        type=path_argument,
        metavar="DIR",
        help=f"write {JSON_FILE} and the trace of each rank there",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


@sys_exit_refused()
def run(arguments: argparse.Namespace) -> Exit:
    """Prints the tables, on rank 0."""
    for name, least in (("steps", 1), ("warmup", 0), ("top", 1)):
        if getattr(arguments, name) < least:
            value = getattr(arguments, name)
            raise UsageError(f"--{name} is {value}; set at least {least}.")
    files, overrides = config_words(arguments)
    if traces := _traces_of_run(files, overrides):
        return _show_run(arguments, traces)
    loaded = load_config(files, overrides, runs=False)
    from train.diagnosis.bench import open_bench
    from train.profiling.profile_config import ProfileConfig

    chosen = loaded.config.profile or ProfileConfig()
    steps = {"wait": 0, "warmup": arguments.warmup, "active": arguments.steps, "repeat": 1}
    with temporary_directory() as temporary, open_bench(loaded) as bench:
        path = _record(bench, chosen.model_copy(update=steps), temporary)
        profile = read_profile(path)
        ranks = dict(enumerate(bench.engine.collectives.all_gather_object(profile.shares)))
        if arguments.to:
            with written_to("--to", arguments.to):
                arguments.to.mkdir(parents=True, exist_ok=True)
                place_copy(path, arguments.to / path.name)
        if bench.engine.is_main:
            _show(arguments, profile, ranks)
    return Exit.DONE


def _record(bench: Bench, config: ProfileConfig, folder: Path) -> Path:
    """Takes the steps; returns the file of this rank's trace. Collective."""
    from train.goodput.clock import PhaseClock
    from train.profiling.recorder import Recorder, annotation

    written: list[Path] = []
    failed: list[str] = []
    recorder = Recorder(
        config,
        bench.engine.rank,
        bench.engine.device,
        folder=lambda: folder,
        written=lambda step, path: written.append(path),
        warn=failed.append,
    )
    clock = PhaseClock()
    clock.annotate = annotation
    taker = bench.steps(clock=clock)
    steps = config.warmup + config.active
    with bench.batches(steps + 1) as batches:
        for step in range(steps + 1):
            if step == 1:  # the first step makes checks, which are not part of the others
                recorder.start(step)
            with clock.within("data"):
                micro_batches = [next(batches) for _ in range(bench.plan.accumulation)]
            taker.take(micro_batches)
            recorder.step_end()
        recorder.close()
    if not written:
        raise RunError(failed[0] if failed else "The profiler has written no trace.")
    return written[0]


def _traces_of_run(files: list[str], overrides: list[str]) -> list[Trace]:
    """The traces of the run that alone is named; none where a config is named, or where the run has
    no traces."""
    if len(files) != 1 or overrides or not Path(files[0]).is_dir():
        return []
    directory = Path(files[0])
    with refused_files(directory):
        return find_traces(directory) if RunDirectory(directory).exists else []


def _show_run(arguments: argparse.Namespace, traces: list[Trace]) -> Exit:
    """Shows the newest trace; of the ranks that have recorded the same steps, the lowest."""
    newest = traces[-1]
    same = [t for t in traces if (t.attempt, t.step) == (newest.attempt, newest.step)]
    with refused_files(same[0].path):
        profiles = {trace.rank: read_profile(trace.path) for trace in same}
    if arguments.to:
        with written_to("--to", arguments.to):
            arguments.to.mkdir(parents=True, exist_ok=True)
            for trace in same:
                place_copy(trace.path, arguments.to / trace_name(trace.rank, trace.step))
    if not arguments.json:
        say(f"attempt {newest.attempt}, steps up to {newest.step}: {same[0].path}")
    _show(arguments, profiles[same[0].rank], {r: p.shares for r, p in profiles.items()})
    return Exit.DONE


def _show(
    arguments: argparse.Namespace, profile: Profile, ranks: dict[int, dict[str, float]]
) -> None:
    values: dict[str, Any] = to_json(profile, ranks, arguments.top)
    say(json_text(values) if arguments.json else table(profile, ranks, arguments.top))
    if arguments.to:
        with written_to("--to", arguments.to):
            replace_text(arguments.to / JSON_FILE, json_text(values, indent=1) + "\n")
        if not arguments.json:
            say(f"wrote {arguments.to / JSON_FILE}; https://ui.perfetto.dev opens the trace there")
