"""Shared memory for data workers, and the node's memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from launch.contract import CGROUPS, OWN_CGROUP, BatchPlan, LoadedConfig, cgroups_of_process
from launch.doctor.checks.units import readable
from launch.doctor.findings import (
    Finding,
    infrastructure_failure,
    misconfigured,
    ok,
    skipped,
    warning,
)
from launch.doctor.guard import attempt
from launch.doctor.place import Place

SHM = Path("/dev/shm")
_NO_LIMIT = 1 << 60  # what version 1 has without a limit is a little less than 2**63
_MIB = 1 << 20
# A colour image of 224 x 224 as floats: larger than a sequence of tokens, smaller than a video.
ASSUMED_SAMPLE = 3 * 224 * 224 * 4
MEASURE_SECONDS = 30.0
# Each tensor of a micro-batch is a file of whole pages.
SMALLEST_BATCH = 4096
_ENLARGE = (
    "enlarge it (docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm), or "
    "set loader.workers lower"
)


def sample_bytes(loaded: LoadedConfig) -> int:
    """Bytes that one sample takes in shared memory: those of the first training sample, collated
    alone. Builds the dataset."""
    task = loaded.task(loaded.config)
    return _tensor_bytes(task.collate([task.train_dataset()[0]]))


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    return int(getattr(value, "nbytes", 0))


def shared_memory(
    place: Place,
    measure: Callable[[LoadedConfig], int] = sample_bytes,
    directory: Path = SHM,
) -> list[Finding]:
    """Whether shared memory has space for the micro-batches of the data workers.

    There are up to ranks of the node x workers x (prefetch + 1) micro-batches: one is in use. The
    size of a sample is measured at level full, otherwise assumed.
    """
    check = "shared memory"
    if sys.platform != "linux":
        return [skipped(check, "checked on Linux only")]
    if place.loaded is None:
        free = _free(directory)
        summary = "does not exist" if free is None else f"has {readable(free)} free"
        return [ok(check, f"{directory} {summary}; the need is not known without a config")]
    loader = place.loaded.config.loader
    if loader.workers == 0:
        return [ok(check, "not needed: loader.workers is 0")]
    free = _free(directory)
    where = place.loaded.composed.where("loader.workers")
    if free is None:
        return [
            misconfigured(
                check,
                f"{directory} does not exist, and loader.workers is {loader.workers} ({where})",
                "mount a tmpfs there, or set loader.workers to 0",
            )
        ]
    micro = BatchPlan.from_config(place.loaded.config.batch, place.world.world_size)
    ranks, prefetch = place.world.local_world_size, loader.prefetch_factor or 2
    batches = ranks * loader.workers * (prefetch + 1)
    per_batch = micro.micro_batch_size or micro.largest_micro_batch
    size, why = None, ""
    if place.full:
        size, why = attempt(partial(measure, place.loaded), MEASURE_SECONDS)
    how = f"assumed{f', as {why}' if why else ''}" if size is None else "measured"
    certain, size = size is not None, size or ASSUMED_SAMPLE
    needed = batches * max(SMALLEST_BATCH, per_batch * size)
    values: dict[str, Any] = {"free_bytes": free, "needed_bytes": needed, "micro_batches": batches}
    summary = (
        f"{directory} has {readable(free)} free; {ranks} rank(s) x {loader.workers} workers x "
        f"{prefetch + 1} micro-batches x {per_batch} samples of {readable(size)} "
        f"({how}) need {readable(needed)}"
    )
    if free >= needed:
        return [ok(check, summary, **values)]
    certain = certain or free < batches * SMALLEST_BATCH
    return [(misconfigured if certain else warning)(check, summary, _ENLARGE, **values)]


def _free(directory: Path) -> int | None:
    try:
        stat = os.statvfs(directory)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def memory(place: Place, cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[Finding]:
    """Free memory of the machine, or within the container's limit, for the node's processes.

    Where all of it would not suffice, the setting is wrong; where others use too much of it, a
    retry may succeed. Of a container, the agent keeps a part for good, and the processes of this
    check give theirs back.
    """
    machine = psutil.virtual_memory()
    limit, left = _cgroup_limit(cgroups, own)
    if limit is None or limit >= machine.total:
        total, free, kind = machine.total, machine.available, ""
    else:
        free = min(machine.available, left)
        total, kind = limit, " (the container's memory limit)"
    given_back, kept = memory_of_check() if kind else (0, 0)
    given_back *= place.world.local_world_size
    summary = f"{readable(free)} free of {readable(total)}{kind}"
    values: dict[str, Any] = {"free_bytes": free, "total_bytes": total}
    findings = []
    needed = place.world.local_world_size * 512 * _MIB  # torch and its libraries, in each process
    need = (
        f"but the {place.world.local_world_size} process(es) need about {readable(needed)} before "
        "any data"
    )
    if total - kept < needed:
        advice = (
            "raise the container's memory limit (docker: --memory; Kubernetes: resources.limits)"
            if kind
            else "use a node with more memory"
        )
        advice += ", or start fewer processes per node"
        findings.append(misconfigured("memory", f"{summary}, {need}", advice, **values))
    elif free + given_back < needed:
        advice = "end other processes " + ("in the container" if kind else "on this node")
        findings.append(infrastructure_failure("memory", f"{summary}, {need}", advice, **values))
    shm = _total(SHM)
    workers = 0 if place.loaded is None else place.loaded.config.loader.workers
    if workers and shm is not None and limit is not None and limit < shm:
        findings.append(
            warning(
                "memory",
                f"{SHM} may grow to {readable(shm)}, which counts towards the container's limit of "
                f"{readable(limit)}",
                "raise the limit by what the data workers need, or processes may be killed",
            )
        )
    return findings or [ok("memory", summary, **values)]


def memory_of_check() -> tuple[int, int]:
    """Bytes of memory that this process, and that the agent which has started it, use alone."""
    with suppress(psutil.Error):
        own = psutil.Process()
        parent = own.parent()
        return _alone(own), _alone(parent) if parent else 0
    return 0, 0


def _alone(process: psutil.Process) -> int:
    used = process.memory_info()
    return max(0, int(used.rss) - int(getattr(used, "shared", 0)))


@dataclass(frozen=True)
class _Version:
    """The files of a version of cgroups."""

    limit: str
    used: str
    cached: str
    """In memory.stat: bytes of files that are not in active use, with those of child cgroups."""


_VERSIONS = (
    _Version("memory.max", "memory.current", "inactive_file"),
    _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _cgroup_limit(cgroups: Path, own: Path) -> tuple[int | None, int]:
    """(limit, free) in bytes, from cgroup 2 or 1: the lowest limit of this process's cgroup and its
    ancestors, and the least that one of them has left. (None, 0) without a limit.

    Files in the page cache that are not in active use do not count as used: the kernel drops them
    when needed.
    """
    limits, left = [], []
    for place, version in product(cgroups_of_process("memory", cgroups, own), _VERSIONS):
        used = _number(place / version.used)
        if used is None:
            continue
        stat = place / "memory.stat"
        taken = max(0, used - (_stat(stat, version.cached) or 0))
        # Version 1 names the lowest limit, also of ancestors that a container does not see.
        lowest = _stat(stat, "hierarchical_memory_limit")
        for limit in (_number(place / version.limit), lowest):
            if limit is not None and limit < _NO_LIMIT:
                limits.append(limit)
                left.append(max(0, limit - taken))
    return (min(limits), min(left)) if limits else (None, 0)


def _number(file: Path) -> int | None:
    """A number in a file of a cgroup; None without one, as in "max"."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _stat(file: Path, name: str) -> int | None:
    """A number of a memory.stat; None where it has none."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None


def _total(directory: Path) -> int | None:
    try:
        stat = os.statvfs(directory)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize
