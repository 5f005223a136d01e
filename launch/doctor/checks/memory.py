"""Shared memory for data workers, and the node's memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from launch.contract import BatchPlan, LoadedConfig
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
_CGROUP = Path("/sys/fs/cgroup")
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


def memory(place: Place, cgroup: Path = _CGROUP) -> list[Finding]:
    """Free memory of the machine, or within the container's limit, for the node's processes.

    Where all of it would not suffice, the setting is wrong; where others use too much of it, a
    retry may succeed.
    """
    machine = psutil.virtual_memory()
    limit, used = _cgroup_limit(cgroup)
    if limit is None or limit >= machine.total:
        total, free, kind = machine.total, machine.available, ""
    else:
        free = min(machine.available, limit - used)
        total, kind = limit, " (the container's memory limit)"
    summary = f"{readable(free)} free of {readable(total)}{kind}"
    values: dict[str, Any] = {"free_bytes": free, "total_bytes": total}
    findings = []
    needed = place.world.local_world_size * 512 * _MIB  # torch and its libraries, in each process
    need = (
        f"but the {place.world.local_world_size} process(es) need about {readable(needed)} before "
        "any data"
    )
    if total < needed:
        advice = (
            "raise the container's memory limit (docker: --memory; Kubernetes: resources.limits)"
            if kind
            else "use a node with more memory"
        )
        advice += ", or start fewer processes per node"
        findings.append(misconfigured("memory", f"{summary}, {need}", advice, **values))
    elif free < needed:
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


def _cgroup_limit(cgroup: Path) -> tuple[int | None, int]:
    """(limit, used) in bytes, from cgroup 2 or 1; (None, 0) without a limit. Files in the page
    cache that are not in active use do not count as used: the kernel drops them when needed."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        try:
            found = int((cgroup / limit).read_text()), int((cgroup / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return found[0], max(0, found[1] - _stat(cgroup / limit, cached))
    return None, 0


def _stat(beside: Path, name: str) -> int:
    """A number of the memory.stat beside a file of a cgroup; 0 where it has none."""
    with suppress(OSError, ValueError):
        for line in beside.with_name("memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _total(directory: Path) -> int | None:
    try:
        stat = os.statvfs(directory)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize
