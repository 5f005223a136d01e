"""``fit --dry-run``: tries each part of a run once, prints what it takes, and leaves nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint.manifest import Manifest
from train.command_line import say
from train.commands.export import prepare_export
from train.config.load import LoadedConfig
from train.exits import Exit, sys_exit_refused
from train.runs.words import duration

if TYPE_CHECKING:
    from train.diagnosis.dry_run import DryRun, Part


@sys_exit_refused()
def try_run(loaded: LoadedConfig) -> Exit:
    """Prints a table, on rank 0. A run directory that is there is not touched. Raises what a run
    raises for what does not work."""
    started = time.perf_counter()
    from train.diagnosis.bench import open_bench
    from train.diagnosis.dry_run import dry_run, temporary_run
    from train.diagnosis.memory import PeakMemory

    with open_bench(loaded) as bench:
        memory = PeakMemory(bench.engine.device)
        start = ("start", time.perf_counter() - started, memory.peak(), "")
        with temporary_run(bench) as directory:
            found = dry_run(bench, directory)
            if not bench.engine.is_main:  # the others wait for nothing
                return Exit.DONE
            export = _try_export(loaded, found, directory)
    say(f"{'part':<26}{'seconds':>9}{'memory, GiB':>13}")
    for name, seconds, peak, note in (start, *found.parts, export):
        shown = f"{peak / 2**30:.2f}" if peak else "-"
        say(f"{name:<26}{seconds:>9.2f}{shown:>13}  {note}".rstrip())
    say(_estimate(found))
    return Exit.DONE


def _try_export(loaded: LoadedConfig, found: DryRun, directory: Path) -> Part:
    import torch

    from train.diagnosis.dry_run import Part
    from train.diagnosis.memory import PeakMemory

    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    started = time.perf_counter()
    exported = prepare_export(loaded, found.checkpoint)
    files = exported.write(directory / "export", loaded, Manifest.read(found.checkpoint))
    seconds = time.perf_counter() - started
    return Part("export", seconds, memory.peak(), ", ".join(path.name for path in files))


def _estimate(found: DryRun) -> str:
    return (
        f"A run of {found.steps} steps takes about {duration(found.run_seconds)}: "
        f"{found.step_seconds:.3g} s per step, {found.evaluations} evaluations of "
        f"{found.evaluation_seconds:.3g} s, {found.saves} checkpoints of "
        f"{found.checkpoint_bytes / 2**20:.1f} MiB. All parts work."
    )
