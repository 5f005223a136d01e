"""Train on one batch until it is learnt, and say what is in the way if it is not.

Runs on one process, or on several that torchrun or accelerate launch start. No run directory is
read or written. Exit code 65 if the batch is not learnt, 78 if loss or gradients are not finite.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.command_line import say
from train.commands.arguments import add_config_arguments, config_words
from train.config.load import load_config
from train.exits import Exit, UsageError, sys_exit_refused
from train.json_text import json_text

if TYPE_CHECKING:
    from train.diagnosis.memorize import Memorized
    from train.diagnosis.signals import Norms

_ROWS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    parser.add_argument(
        "--steps", type=int, default=200, help="most steps on the batch; default: 200"
    )
    parser.add_argument(
        "--ratio",
        type=float,
        default=0.1,
        help="the batch is learnt when its loss is this times the first one; default: 0.1",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


@sys_exit_refused()
def run(arguments: argparse.Namespace) -> Exit:
    """Prints the course of the loss, norms by parameter, and the findings, on rank 0."""
    if arguments.steps < 2:
        raise UsageError(f"--steps is {arguments.steps}; set at least 2.")
    if not 0.0 < arguments.ratio < 1.0:
        raise UsageError(f"--ratio is {arguments.ratio:g}; set a number between 0 and 1.")
    loaded = load_config(*config_words(arguments), runs=False)
    from train.diagnosis.bench import open_bench
    from train.diagnosis.memorize import findings, memorize

    learning_rate = loaded.config.optim.lr
    with open_bench(loaded) as bench:
        result = memorize(bench, learning_rate, arguments.steps, arguments.ratio)
        is_main = bench.engine.is_main
    code = Exit.DONE if result.learnt else Exit.DATA if result.is_finite else Exit.NOT_FINITE
    if not is_main:
        return code
    found = findings(result, learning_rate)
    losses = result.losses
    if arguments.json:
        say(json_text({"learnt": result.learnt, "losses": losses, "findings": found}))
        return code
    _print_course(result)
    _print_norms(result.before)
    if result.learnt:
        verdict = "But:" if found else "Model, loss and optimiser work together."
        say(
            f"learnt: the loss on one batch fell from {losses[0]:.4g} to {losses[-1]:.4g} in "
            f"{len(losses)} steps. {verdict}"
        )
    else:
        say(
            f"not learnt: the loss on one batch is {losses[-1]:.4g} after {len(losses)} steps, "
            f"{losses[0]:.4g} at first."
        )
    for text in found:
        say(f"- {text}")
    return code


def _print_course(result: Memorized) -> None:
    taken = result.taken
    say(f"{'step':>6}{'loss':>12}{'gradient norm':>15}")
    every = max(1, len(taken) // 10)
    shown = sorted({*range(0, len(taken), every), len(taken) - 1})
    for index in shown:
        say(f"{index + 1:>6}{taken[index].loss:>12.5g}{taken[index].grad_norm:>15.4g}")


def _print_norms(norms: Mapping[str, Norms]) -> None:
    """Of the parameters, after the first step."""
    width = max((len(name) for name in norms), default=0) + 2
    say(f"{'parameter':<{width}}{'weight norm':>12}{'gradient norm':>15}")
    for name in list(norms)[:_ROWS]:
        gradient = norms[name].gradient
        shown = "-" if gradient is None else f"{gradient:.3g}"
        say(f"{name:<{width}}{norms[name].weight:>12.3g}{shown:>15}")
    if len(norms) > _ROWS:
        say(f"... and {len(norms) - _ROWS} more")
