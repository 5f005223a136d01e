"""Try sizes of micro-batches, and print the memory and the throughput of each.

Takes a few steps with each size on this placement, or on those of --on, until one does not fit.
What fits and is fast goes into batch.micro_batch_size, which changes no results but dropout masks.
No run directory is read or written.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from train.command_line import say
from train.commands.arguments import add_config_arguments, config_words
from train.commands.placements import Placement, parse, result_of
from train.config.load import LoadedConfig, load_config
from train.exits import Exit, UsageError, sys_exit_refused
from train.json_text import json_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    parser.add_argument(
        "--on",
        metavar="PLACEMENT",
        action="append",
        default=[],
        help="PROCESSES or PROCESSES:STRATEGY of this machine, such as 2:fsdp2; repeatable; "
        "default: this process, or those of the launcher",
    )
    parser.add_argument(
        "--up-to", type=int, metavar="SIZE", help="try no larger micro-batches than this"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


@sys_exit_refused()
def run(arguments: argparse.Namespace) -> Exit:
    """Prints a table, on rank 0."""
    if arguments.up_to is not None and arguments.up_to < 1:
        raise UsageError(f"--up-to is {arguments.up_to}; set at least 1.")
    placements = [parse(word) for word in arguments.on]
    files, overrides = config_words(arguments)
    if placements:
        found = [_elsewhere(arguments, files, overrides, placement) for placement in placements]
    else:
        here = _here(load_config(files, overrides, runs=False), arguments.up_to)
        if here is None:  # rank 0 prints it
            return Exit.DONE
        found = [here]
    if arguments.json:
        say(json_text({"placements": found}))
    else:
        _print(found)
    return Exit.DONE


def _here(loaded: LoadedConfig, up_to: int | None) -> dict[str, Any] | None:
    from train.diagnosis.batch_sizes import fastest, try_sizes
    from train.diagnosis.bench import open_finder

    with open_finder(loaded) as (finder, engine, strategy):
        tried = try_sizes(finder, engine, up_to)
        if not engine.is_main:
            return None
        placement = str(Placement(engine.world_size, strategy))
    fitting = [t for t in tried if t.fits]
    return {
        "placement": placement,
        "device": engine.device.type,
        "sizes": [t._asdict() | {"fits": t.fits} for t in tried],
        "largest": fitting[-1].micro_batch_size,
        "fastest": fastest(fitting).micro_batch_size,
    }


def _elsewhere(
    arguments: argparse.Namespace, files: list[str], overrides: list[str], placement: Placement
) -> dict[str, Any]:
    words = [word for file in files for word in ("--config", file)]
    words += [*overrides, f"strategy={placement.strategy}", "--json"]
    words += [f"--up-to={arguments.up_to}"] if arguments.up_to else []
    line = result_of(placement, "batch-size", *words, start='{"placements"')
    (found,) = json.loads(line)["placements"]
    return dict(found)


def _print(found: list[dict[str, Any]]) -> None:
    width = max(len("placement"), *(len(of["placement"]) for of in found))
    say(
        f"{'placement':<{width}}{'micro-batch':>13}{'accumulation':>14}{'memory, GiB':>13}"
        f"{'samples/s':>11}"
    )
    for of in found:
        for size in of["sizes"]:
            start = f"{of['placement']:<{width}}{size['micro_batch_size']:>13}"
            start += f"{size['accumulation']:>14}"
            if not size["fits"]:
                say(f"{start}  out of memory")
                continue
            memory = f"{size['memory'] / 2**30:.2f}" if size["memory"] else "-"
            say(f"{start}{memory:>13}{size['samples_per_second']:>11.4g}")
    for of in found:
        largest = "" if of["largest"] == of["fastest"] else f"; the largest: {of['largest']}"
        say(f"{of['placement']}: the fastest is batch.micro_batch_size={of['fastest']}{largest}")
