"""Shared by all benchmarks: robust statistics, tables, and environment variables."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import median


def _cores() -> set[int]:
    """The CPU cores that this process may use: on Linux those of its affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


THREADS = len(_cores())
"""The number of usable CPU cores."""

ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "OMP_NUM_THREADS": str(THREADS),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the maximum that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
"""For all measured processes: equal threads, no GPU, no network. The MALLOC settings keep freed
memory in the process: glibc's default adapts to earlier frees, which can change the time per step
by 20 %."""


QUIET = 0.1
"""Cores that other processes may use during a counted measurement."""


class Others:
    """CPU use of other processes since the creation of this object.

    Other than this process and its descendants, such as W&B's service.
    """

    def __init__(self) -> None:
        self._started, self._busy, self._ours = time.monotonic(), _busy(), _ours()

    def cores(self) -> float:
        """Cores used on average; the resolution is about 0.01."""
        seconds = time.monotonic() - self._started
        return max(0.0, (_busy() - self._busy - (_ours() - self._ours)) / seconds)


# "guest" times are part of "user"; macOS has only "idle".
_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")


def _busy() -> float:
    import psutil

    mine = _cores()
    return sum(
        float(sum(times) - sum(getattr(times, name, 0.0) for name in _NOT_BUSY))
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
    """Half the interquartile range, a robust measure of dispersion."""
    ordered = sorted(values)

    def quantile(q: float) -> float:
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    return (quantile(0.75) - quantile(0.25)) / 2


def median_and_spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """The median ± the spread of ``scale`` times the values, as text."""
    scaled = [value * scale for value in values]
    return f"{median(scaled):,.{digits}f} ±{spread(scaled):.{digits}f}"


def ratios(reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """Reference / value per round, so that load during a round cancels out."""
    return [r / v for r, v in zip(reference, values, strict=True)]


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
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
    """A line on cores, architecture, versions, ``threads`` per process, and load average."""
    import torch

    load = os.getloadavg()[0]
    return (
        f"{THREADS} cores {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {threads} thread(s); load average at start {load:.1f}"
    )
