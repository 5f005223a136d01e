"""Settings of a node's environment that a training stumbles over."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from launch.doctor.checks.interfaces import VARIABLES, choose, interfaces
from launch.doctor.findings import Finding, misset, ok, warning
from launch.doctor.place import Place

_CGROUP = Path("/sys/fs/cgroup")
_RDMA = Path("/sys/class/infiniband")


def network_interfaces(place: Place) -> list[Finding]:
    """Whether the interfaces that NCCL and gloo are told to use are there."""
    findings = []
    there = interfaces()
    for variable in VARIABLES:
        wanted = place.environ.get(variable)
        if not wanted:
            continue
        chosen = choose(variable, wanted, there)
        if not chosen:
            findings.append(
                misset(
                    "interfaces",
                    f"{variable} is {wanted!r}, which names no interface of this node; it has "
                    f"{', '.join(sorted(there))}",
                    f"correct or unset {variable}",
                )
            )
        elif not any(there[name] for name in chosen):
            findings.append(
                misset(
                    "interfaces",
                    f"{variable} is {wanted!r}, but {', '.join(chosen)} has no address",
                    f"set {variable} to an interface with an address, or unset it",
                )
            )
        else:
            findings.append(ok("interfaces", f"{variable} is {wanted!r}: {', '.join(chosen)}"))
    return findings


def cores(cgroup: Path = _CGROUP) -> float:
    """The processor cores that this process may use, by affinity and by the container's quota."""
    count = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            count = min(count, int(quota) / int(period))
    except (OSError, ValueError):
        pass  # no such limit, or not told here
    return count


def threads(place: Place) -> list[Finding]:
    """Whether the processes of the node have more threads than it has cores."""
    processes, there = place.world.local_world_size, cores()
    told = place.environ.get("OMP_NUM_THREADS", "")
    if told and not (told.isdigit() and int(told) > 0):
        return [
            misset(
                "threads",
                f"OMP_NUM_THREADS is {told!r}, which is no number of threads",
                "set it to a whole number of at least 1",
            )
        ]
    if not told and processes == 1:
        return [ok("threads", f"{there:g} cores for one process", cores=there)]
    # Without the variable each process takes all cores.
    each = int(told) if told else int(there)
    said = f"{processes} x {each} threads ({'OMP_NUM_THREADS' if told else 'by default'})"
    if processes * each > there:
        return [
            warning(
                "threads",
                f"{said} on {there:g} cores",
                f"set OMP_NUM_THREADS to {max(1, int(there / processes))}",
                cores=there,
            )
        ]
    return [ok("threads", f"{said} on {there:g} cores", cores=there)]


def limits(place: Place) -> list[Finding]:
    """Open files, and locked memory where there is RDMA."""
    findings = []
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _files_needed(place)
    if files != resource.RLIM_INFINITY and files < needed:
        findings.append(
            warning(
                "limits",
                f"a process may open {files} files, and about {needed} are needed for sockets "
                "and data workers",
                f"raise it: ulimit -n {needed}"
                + (f" (the hard limit here is {most})" if 0 <= most < needed else ""),
            )
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _RDMA.is_dir() and any(_RDMA.iterdir()) and locked != resource.RLIM_INFINITY:
        findings.append(
            warning(
                "limits",
                f"there is RDMA, but only {locked >> 10} KiB of memory may be locked",
                "start it with ulimit -l unlimited, or NCCL falls back to TCP or fails",
            )
        )
    return findings or [ok("limits", f"a process may open {files} files")]


def _files_needed(place: Place) -> int:
    """Libraries, logs and pipes; a connection to each rank; two files for each tensor that is on
    its way from a data worker, at about four tensors per micro-batch."""
    needed = 256 + 2 * place.world.world_size
    if place.loaded is not None:
        loader = place.loaded.config.loader
        needed += 8 * loader.workers * (loader.prefetch_factor or 2)
    return needed


def proxies(hosts: Mapping[str, list[str]]) -> list[Finding]:
    """Whether a proxy stands between the nodes; ``hosts``: each node's name to its addresses."""
    variables = [name for name in ("http", "https", "all") if name in getproxies_environment()]
    if not variables:
        return []
    between = [
        name
        for host, addresses in hosts.items()
        for name in (host, *addresses)
        if not proxy_bypass(name)
    ]
    if not between:
        return [ok("proxies", f"{', '.join(variables)}_proxy is set, and no_proxy has all nodes")]
    return [
        warning(
            "proxies",
            f"{', '.join(f'{name}_proxy' for name in variables)} is set, and no_proxy does not "
            f"have {', '.join(between[:4])}{' ...' if len(between) > 4 else ''}",
            "add the nodes to no_proxy: what speaks HTTP or gRPC between them (etcd, object "
            "storage in the cluster) would go to the proxy",
        )
    ]
