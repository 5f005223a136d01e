"""Two ranks: isorun compared with hand-written loops and with one process.

Contenders take turns as in :mod:`benchmarks.loop`; each has a process per rank with one thread.
Uses two GPUs if there are any, else the CPU. The parts:

ddp fsdp2 zero1 zero2 zero3   isorun on two ranks compared with hand-written
                              DistributedDataParallel, fully_shard and deepspeed.initialize
speedup                       the same global batch on one process and on two
recovery                      from the kill of a rank to the next step
resume                        from the command to the first new step
gpu                           isorun compared with a bare loop: bf16, compiled, 124 M and 1 B
                              parameters
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.contenders import Train, bare, isorun, isorun_without_sinks
from benchmarks.loop import measure, report
from benchmarks.raw_loops import RAW
from benchmarks.team import Team
from benchmarks.timing import ENVIRONMENT, machine

SAME = 20
"""Steps whose losses are compared."""


@dataclass(frozen=True)
class Contender:
    """A name, a training function, and a number of ranks."""

    name: str
    train: Train
    ranks: int = 2


def ours(strategy: str) -> Train:
    """isorun with a strategy."""
    return partial(isorun_with, isorun, f"strategy={strategy}")


def isorun_with(train: Callable[..., None], override: str, work: Any) -> None:
    """Calls ``train(work, override)``; for ``partial`` with the last argument free."""
    train(work, override)


def beside_raw(strategy: str) -> list[Contender]:
    """The hand-written loop (the reference), and isorun with and without sinks."""
    quiet = partial(isorun_with, isorun_without_sinks, f"strategy={strategy}")
    return [
        Contender(f"raw {strategy} x2", RAW[strategy]),
        Contender(f"isorun {strategy} x2", ours(strategy)),
        Contender(f"isorun {strategy} x2, no sinks", quiet),
    ]


SPEEDUP = {
    "bare": [Contender("bare PyTorch x1", bare, 1), Contender("raw DDP x2", RAW["ddp"])],
    "isorun": [
        Contender("isorun x1", isorun, 1),
        *(Contender(f"isorun {s} x2", ours(s)) for s in ("ddp", "fsdp2", "zero1")),
    ],
}


def compare(contenders: Sequence[Contender], size: Any, short: str) -> None:
    """Prints the table of one size; starts new processes."""
    teams: list[Team] = []
    try:
        for one in contenders:
            teams.append(Team(one.name, one.train, [size], one.ranks))
        print(report(size, measure(teams, size), short, SAME), flush=True)
    finally:
        for team in teams:
            team.end()


def sizes(arguments: argparse.Namespace) -> list[Any]:
    """The sizes of :mod:`benchmarks.loop` with twice the batch, so that a rank has the same
    batch."""
    from benchmarks.workload import SIZES

    doubled = [replace(size, batch=2 * size.batch) for size in SIZES]
    if arguments.quick:
        return [replace(doubled[0], steps=20, rounds=3)]
    chosen = [size for size in doubled if not arguments.sizes or size.name in arguments.sizes]
    return [replace(size, rounds=arguments.turns or size.rounds) for size in chosen]


def raw_part(strategy: str, arguments: argparse.Namespace) -> None:
    """isorun compared with the hand-written loop."""
    print(f"\n## {strategy} on two ranks: hand-written and isorun")
    for size in sizes(arguments):
        compare(beside_raw(strategy), size, "raw")


def speedup_part(arguments: argparse.Namespace) -> None:
    """One process compared with two."""
    print("\n## The same global batch on one process and on two")
    for size in sizes(arguments):
        for contenders in SPEEDUP.values():
            compare(contenders, size, "one process")


def recovery_part(arguments: argparse.Namespace) -> None:
    """Recovery from the kill of a rank."""
    from benchmarks.recovery import recovery

    recovery(1 if arguments.quick else arguments.turns or 7, quick=arguments.quick)


def resume_part(arguments: argparse.Namespace) -> None:
    """Time from the command to the first step."""
    from benchmarks.recovery import resume

    resume(1 if arguments.quick else arguments.turns or 7)


def gpu_part(arguments: argparse.Namespace) -> None:
    """Large models on a GPU."""
    from benchmarks.large import large

    large(3 if arguments.quick else arguments.turns)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    **{strategy: partial(raw_part, strategy) for strategy in RAW},
    "speedup": speedup_part,
    "recovery": recovery_part,
    "resume": resume_part,
    "gpu": gpu_part,
}


def main() -> None:
    """Runs all or the selected parts and prints their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, help="default: all")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="as in benchmarks.loop")
    parser.add_argument("--turns", type=int, help="counted turns or repetitions")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test without meaningful measurements"
    )
    arguments = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(f"# Scaling\n\n{machine(threads=1)}", flush=True)
    for name in arguments.only or PARTS:
        os.environ |= {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        if gpus >= (1 if name == "gpu" else 2):
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
        PARTS[name](arguments)


if __name__ == "__main__":
    main()
