"""Verify a run's checkpoints, and that each sample was used exactly once.

Reads and hashes every file of every checkpoint, recomputes from the seed the samples of each
committed step, and compares the values that several files of the run have. The exit code is 0 if
everything is valid, else 65.
"""

from __future__ import annotations

import argparse

from train.checkpoint.consistency import contradictions
from train.checkpoint.damage import refused_files
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.command_line import say
from train.commands.arguments import add_config_arguments, config_words
from train.config.load import LoadedConfig, load_config
from train.data.ledger_check import verify
from train.exits import Exit, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)


def run(arguments: argparse.Namespace) -> Exit:
    """Prints one line per checkpoint and one for the ledger."""
    loaded = load_config(*config_words(arguments), runs=False)
    directory = RunDirectory(loaded.run_directory)
    with refused_files(directory.path):
        return _verify(loaded, directory)


def _verify(loaded: LoadedConfig, directory: RunDirectory) -> Exit:
    if not directory.exists:
        raise UsageError(
            f"There is no run in {loaded.run_directory_as_set} (run.dir); start one with "
            f"`{loaded.command('fit')}`, or set run.dir to the directory of a run."
        )
    store = CheckpointStore(directory.checkpoints)
    valid = True
    for step in store.steps():
        problems = store.problems(step)
        valid = valid and not problems
        say(f"checkpoint step {step}: {'; '.join(problems) if problems else 'ok'}")
    if not store.steps():
        say("checkpoints: none yet")
    finished = directory.finished()
    if finished and finished["step"] not in store.steps():
        valid = False
        say(f"checkpoint step {finished['step']}: missing, but the run finished at this step")
    report = verify(
        directory.ledger,
        last_step=finished["step"] if finished else None,
        committed_step=max(store.steps(), default=0),
    )
    say(f"ledger: {report}")
    found = contradictions(directory)
    for fault in found:
        say(f"contradiction: {fault}")
    valid = valid and report.ok and not found
    say("all well" if valid else "NOT well")
    return Exit.DONE if valid else Exit.DATA
