"""The processor cores that this process may use, and how many threads follow from them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from train.process.cgroups import CGROUPS, OWN_CGROUP, cgroups_of_process


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """By CPU affinity, and by the lowest quota of the process's cgroup and its ancestors, which is
    what a container's CPU limit sets; all cores on systems without either. May be a fraction."""
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    for place in cgroups_of_process("cpu", cgroups, own):
        quota = _quota(place)
        if quota is not None:
            cores = min(cores, quota)
    return cores


def threads_per_process(processes: int, cores: float | None = None) -> int:
    """How many threads each of several processes gets: the cores, by default the usable ones,
    divided by them; at least 1.

    More threads than the quota allows stop each other: a step of a small model took four times as
    long with two threads on one core.
    """
    return max(1, int((usable_cores() if cores is None else cores) / processes))


def _quota(cgroup: Path) -> float | None:
    """The quota of one cgroup in cores; None without one."""
    with suppress(OSError, ValueError):  # version 2; ValueError for "max"
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1; -1 without a limit
        microseconds = int((cgroup / "cpu.cfs_quota_us").read_text())
        if microseconds > 0:
            return microseconds / int((cgroup / "cpu.cfs_period_us").read_text())
    return None
