"""What all benchmarks share: robust statistics, tables, and the settings of fair processes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import median

THREADS = len(os.sched_getaffinity(0))
"""As many as there are cores, or as ``taskset`` allows."""

ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "OMP_NUM_THREADS": str(THREADS),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # glibc takes no more
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
"""Of every process that is measured: the same threads, no device, no network. And the memory once
taken is kept: by default glibc learns from what is freed whether to give it back after each step,
and what a program freed at its start can make all its later steps a fifth slower or faster."""


QUIET = 0.1
"""Cores that other programs may use in a measurement that is to count."""


class Others:
    """How busy programs that are not ours kept the machine since this was made.

    Ours are this process and all processes below it, such as W&B's service.
    """

    def __init__(self) -> None:
        self._started, self._busy, self._ours = time.monotonic(), _busy(), _ours()

    def cores(self) -> float:
        """Cores used on average; a hundredth or so is the clock's own coarseness."""
        seconds = time.monotonic() - self._started
        return max(0.0, (_busy() - self._busy - (_ours() - self._ours)) / seconds)


def _busy() -> float:
    import psutil

    mine = os.sched_getaffinity(0)
    return sum(
        float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
        for core, times in enumerate(psutil.cpu_times(percpu=True))
        if core in mine
    )


def _ours() -> float:
    import psutil

    total, me = 0.0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, the robust sibling of the standard deviation."""
    ordered = sorted(values)

    def quantile(q: float) -> float:
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    return (quantile(0.75) - quantile(0.25)) / 2


def median_and_spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """The median and, after a plus-minus, the spread; each value is multiplied by ``scale``."""
    scaled = [value * scale for value in values]
    return f"{median(scaled):,.{digits}f} ±{spread(scaled):.{digits}f}"


def ratios(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """Reference over value, round by round: what slows a whole round down cancels out."""
    return [r / v for r, v in zip(reference, values, strict=True)]


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as plain text."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = "|".join(
        f"{'-' * (width + 1)}:" if column else "-" * (width + 2)
        for column, width in enumerate(widths)
    )
    return "\n".join([f"\n{title}\n", joined(lines[0]), f"|{rule}|", *map(joined, lines[1:])])


def machine(threads: int = THREADS) -> str:
    """The machine in general words, and the version of torch; ``threads`` are a process's."""
    import torch

    load = os.getloadavg()[0]
    return (
        f"{THREADS} cores {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {threads} thread(s); load average at start {load:.1f}"
    )
