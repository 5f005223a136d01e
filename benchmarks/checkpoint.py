"""Stall of the training for a checkpoint: asynchronous compared with blocking saves.

In turns, both write the same tensors (parameters and AdamW's two moments, fp32) to the same disk.
During an asynchronous write, the main thread computes, as in training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing import machine, median_and_spread, ratios, table
from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.saver import CheckpointSaver, SaveRequest
from train.checkpoint.store import CheckpointStore
from train.distributed.collectives import Collectives
from train.distributed.shard import Shard

_TENSORS = 20


def tensors(parameters: int) -> dict[str, Shard]:
    """``parameters`` numbers in 20 matrices, and two moments of each matrix."""
    rows = parameters // _TENSORS // 1000
    return {
        f"{kind}.{number}": Shard.of(torch.randn(rows, 1000))
        for number in range(_TENSORS)
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def measure(parameters: int, saves: int, directory: Path) -> dict[str, list[float]]:
    """Seconds per save: the stalls of both kinds, and the asynchronous write."""
    state = tensors(parameters)
    savers = {
        kind: CheckpointSaver(
            CheckpointStore(directory / f"{parameters}-{kind}"),
            CheckpointConfig(asynchronous=kind == "asynchronous", keep_last=1),
            Collectives(0, 1),
        )
        for kind in ("asynchronous", "blocking")
    }
    savers["asynchronous"].reserve(state)
    work = torch.randn(512, 512)
    found: dict[str, list[float]] = {"asynchronous": [], "blocking": [], "write": []}
    for step in range(1, saves + 2):
        for kind, saver in savers.items():
            started = time.perf_counter()
            saver.save(state, SaveRequest(step, {}, None, lambda: None))
            stall = time.perf_counter() - started
            while saver.in_flight:
                work @ work
            error = saver.wait()
            if error is not None:
                raise SystemExit(f"a save failed: {error}")
            if step > 1:  # the first save imports torch.distributed.checkpoint
                found[kind].append(stall)
                if kind == "asynchronous":
                    found["write"].append(saver.last_timing.write)
    return found


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=7, help="counted saves of each kind")
    parser.add_argument("--parameters", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--directory", help="output directory; default: the temporary directory")
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for parameters in arguments.parameters:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            found = measure(parameters, arguments.saves, Path(directory))
        gigabytes = parameters * 12 / 1e9
        rows.append(
            [
                f"{parameters // 10**6} M ({gigabytes:.2f} GB)",
                median_and_spread(found["asynchronous"], 1, 1e3),
                median_and_spread(found["blocking"], 1, 1e3),
                median_and_spread(ratios(found["blocking"], found["asynchronous"]), 1),
                median_and_spread([gigabytes / seconds for seconds in found["write"]]),
            ]
        )
    header = ["parameters", "asynchronous, ms", "blocking, ms", "ratio", "background write, GB/s"]
    print(
        table(
            "Stall of the training for a checkpoint (median ± half the interquartile range)",
            header,
            rows,
        )
    )


if __name__ == "__main__":
    main()
