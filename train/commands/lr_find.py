"""Find a learning rate: take steps with a growing rate and watch the loss.

The learning-rate range test (Smith, 2017) with the config's model, data, optimiser and placement.
Runs on one process, or on several that torchrun or accelerate launch start, with the same result.
No run directory is read or written.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from train.command_line import say
from train.commands.arguments import add_config_arguments, config_words
from train.config.load import load_config
from train.exits import Exit, UsageError, sys_exit_refused
from train.json_text import json_text
from train.paths import path_argument

_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    parser.add_argument("--lo", type=float, default=1e-6, help="first learning rate; default: 1e-6")
    parser.add_argument("--hi", type=float, default=1.0, help="last learning rate; default: 1")
    parser.add_argument("--steps", type=int, default=100, help="number of steps; default: 100")
    parser.add_argument(
        "--to",
        type=path_argument,
        metavar="DIR",
        help="write lr-find.html, lr-find.json and, with the extra `plot`, lr-find.png there",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


@sys_exit_refused()
def run(arguments: argparse.Namespace) -> Exit:
    """Prints a table and a suggestion, on rank 0."""
    _check(arguments)
    loaded = load_config(*config_words(arguments), runs=False)
    from train.diagnosis.bench import open_bench
    from train.diagnosis.learning_rates import judge, smooth, sweep

    lo, hi, steps = arguments.lo, arguments.hi, arguments.steps
    with open_bench(loaded) as bench:
        tried = sweep(bench, lo, hi, steps)
        is_main = bench.engine.is_main
    if not is_main:
        return Exit.DONE
    found = judge(tried, lo, hi, steps)
    result: dict[str, Any] = {
        "suggestion": found.suggestion,
        "reason": found.reason,
        "learning_rate": [t.learning_rate for t in tried],
        "loss": [t.loss for t in tried],
        "smoothed": smooth([t.loss for t in tried]),
    }
    if arguments.json:
        say(json_text(result))
    else:
        say(f"{'learning rate':>14}{'loss':>12}{'smoothed':>12}")
        every = max(1, len(tried) // _ROWS)
        for index in range(every - 1, len(tried), every):
            loss, smoothed = tried[index].loss, result["smoothed"][index]
            say(f"{tried[index].learning_rate:>14.3g}{loss:>12.5g}{smoothed:>12.5g}")
        say(found.reason)
        if found.suggestion is not None:
            say(f"suggestion: optim.lr={found.suggestion:.2g}")
    if arguments.to:
        from train.diagnosis.range_plot import write_plots

        for path in write_plots(arguments.to, result):
            if not arguments.json:
                say(f"wrote {path}")
    return Exit.DONE


def _check(arguments: argparse.Namespace) -> None:
    if not (0.0 < arguments.lo < arguments.hi and math.isfinite(arguments.hi)):
        raise UsageError(
            f"--lo is {arguments.lo:g} and --hi is {arguments.hi:g}; set 0 < --lo < --hi."
        )
    if arguments.steps < 10:
        raise UsageError(f"--steps is {arguments.steps}; set at least 10.")
