"""Settings of a node's environment that can make a training fail or slow."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass

from launch.contract import threads_per_process, usable_cores, whole_number
from launch.doctor.checks.interfaces import VARIABLES, choose, interfaces
from launch.doctor.findings import Finding, misconfigured, ok, warning
from launch.doctor.place import Place

_RDMA = Path("/sys/class/infiniband")


def network_interfaces(place: Place) -> list[Finding]:
    """Whether the interfaces that NCCL and gloo are set to use exist."""
    findings = []
    there = interfaces()
    for variable in VARIABLES:
        wanted = place.environ.get(variable)
        if not wanted:
            continue
        chosen = choose(variable, wanted, there)
        if not chosen:
            findings.append(
                misconfigured(
                    "interfaces",
                    f"{variable} is {wanted!r}, which names no interface of this node; it has "
                    f"{', '.join(sorted(there))}",
                    f"correct or unset {variable}",
                )
            )
        elif not any(there[name] for name in chosen):
            findings.append(
                misconfigured(
                    "interfaces",
                    f"{variable} is {wanted!r}, but {', '.join(chosen)} has no address",
                    f"set {variable} to an interface with an address, or unset it",
                )
            )
        else:
            findings.append(ok("interfaces", f"{variable} is {wanted!r}: {', '.join(chosen)}"))
    return findings


def threads(place: Place) -> list[Finding]:
    """Whether the processes of the node have more threads than it has cores."""
    processes, there = place.world.local_world_size, usable_cores()
    given = place.environ.get("OMP_NUM_THREADS", "")
    if given and not whole_number(given):
        return [
            misconfigured(
                "threads",
                f"OMP_NUM_THREADS is {given!r}, which is not a number of threads",
                "set it to a whole number of at least 1",
            )
        ]
    if not given and processes == 1:
        return [ok("threads", f"{there:g} cores for one process", cores=there)]
    # Without the variable each process uses all cores.
    each = int(given) if given else threads_per_process(1, there)
    summary = f"{processes} x {each} threads ({'OMP_NUM_THREADS' if given else 'by default'})"
    if processes * each > there:
        return [
            warning(
                "threads",
                f"{summary} on {there:g} cores",
                f"set OMP_NUM_THREADS to {threads_per_process(processes, there)}",
                cores=there,
            )
        ]
    return [ok("threads", f"{summary} on {there:g} cores", cores=there)]


def limits(place: Place) -> list[Finding]:
    """Open files, and locked memory where there is RDMA."""
    findings = []
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _files_needed(place)
    if files != resource.RLIM_INFINITY and files < needed:
        findings.append(
            warning(
                "limits",
                f"a process may open {files} files, but needs about {needed} for sockets and data "
                "workers",
                f"raise the limit: ulimit -n {needed}"
                + (f" (the hard limit here is {most})" if 0 <= most < needed else ""),
            )
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _RDMA.is_dir() and any(_RDMA.iterdir()) and locked != resource.RLIM_INFINITY:
        findings.append(
            warning(
                "limits",
                f"the node has RDMA, but only {locked >> 10} KiB of memory may be locked",
                "start the run with ulimit -l unlimited, or NCCL falls back to TCP or fails",
            )
        )
    return findings or [ok("limits", f"a process may open {files} files")]


def _files_needed(place: Place) -> int:
    """Libraries, logs and pipes; a connection to each rank; two files for each tensor that a data
    worker has sent, at about four tensors per micro-batch."""
    needed = 256 + 2 * place.world.world_size
    if place.loaded is not None:
        loader = place.loaded.config.loader
        needed += 8 * loader.workers * (loader.prefetch_factor or 2)
    return needed


def proxies(hosts: Mapping[str, list[str]]) -> list[Finding]:
    """Whether nodes connect to each other through a proxy; ``hosts``: host name to addresses."""
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
            "add the nodes to no_proxy, or HTTP and gRPC between them (etcd, object storage in "
            "the cluster) goes through the proxy",
        )
    ]
