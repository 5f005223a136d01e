"""Devices and drivers: what each node has, and whether all nodes have the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from launch.contract import driver_version
from launch.doctor.checks.versions import differences, in_words, usual_values
from launch.doctor.findings import Finding, infrastructure_failure, misconfigured, ok, warning
from launch.doctor.place import Place

CHECK = "devices"
_GIB = 1 << 30
_SHOWS_OWN_GPUS = ("srun", "unknown")
"""Launchers that may show each rank other GPUs than this one has (Slurm's --gpus-per-task). Whether
each rank has a GPU of its own is then found when all ranks meet."""


def inventory() -> dict[str, Any]:
    """The node's devices as torch reports them, as plain values to compare between nodes."""
    import torch

    count = torch.cuda.device_count()
    kinds = Counter(torch.cuda.get_device_name(index) for index in range(count))
    found: dict[str, Any] = {
        "count": count,
        "kinds": ", ".join(f"{number} x {name}" for name, number in sorted(kinds.items())) or "cpu",
        "cuda": torch.version.cuda or "none",
        "driver": driver_version() or "none",
    }
    if count and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def check(place: Place, found: Mapping[str, Any]) -> list[Finding]:
    """Whether this node's devices are right for its processes."""
    count, processes = found["count"], place.world.local_world_size
    visible = place.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    if count == 0:
        if found["cuda"] != "none" and found["driver"] != "none" and visible != "":
            return [
                infrastructure_failure(
                    CHECK,
                    f"a driver is loaded ({found['driver']}), but torch (CUDA {found['cuda']}) "
                    f"finds no GPU{limited}",
                    "run nvidia-smi on this node; the driver may be too old for this CUDA version, "
                    "or the container was started without GPUs",
                    **found,
                )
            ]
        return [ok(CHECK, f"no GPU{limited}, {processes} process(es) on the CPU", **found)]
    summary = f"{found['kinds']}, driver {found['driver']}, CUDA {found['cuda']}"
    if processes > count and place.world.launcher not in _SHOWS_OWN_GPUS:
        return [
            misconfigured(
                CHECK,
                f"{processes} processes, but {count} GPU(s){limited}",
                "start one process per GPU (--nproc-per-node gpu), or make more GPUs visible",
                **found,
            )
        ]
    if processes > count:
        return [ok(CHECK, f"{summary} for each of {processes} processes{limited}", **found)]
    if processes < count:
        return [
            warning(
                CHECK,
                f"{summary}; {count - processes} of the GPUs have no process",
                "start one process per GPU (--nproc-per-node gpu)",
                **found,
            )
        ]
    return [ok(CHECK, summary, **found), *(_occupied(count) if place.full else [])]


def _occupied(count: int) -> list[Finding]:
    """Warnings for GPUs whose memory other processes use."""
    import torch

    findings = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < 0.9 * total:
            findings.append(
                warning(
                    CHECK,
                    f"only {free / _GIB:.0f} of {total / _GIB:.0f} GiB of GPU {index} are free",
                    "run nvidia-smi to find the process that uses it, perhaps of an earlier run",
                )
            )
    return findings


def compare(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A failure for each node whose devices or drivers differ from those of most nodes."""
    usual = usual_values(nodes)
    return [
        infrastructure_failure(
            CHECK,
            in_words(odd),
            "run nvidia-smi on this node, or start the run on equal nodes",
            node=node,
        )
        for node, found in nodes.items()
        if (odd := differences(found, usual))
    ]
