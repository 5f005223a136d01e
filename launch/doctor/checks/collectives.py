"""All-reduce: whether it is correct, how fast it is, and which nodes are slow.

It uses NCCL on GPUs and gloo on CPUs, as a training does. All ranks take part.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.contract import gpu_index, shared_gpu, use_loopback
from launch.doctor.checks.units import readable
from launch.doctor.findings import Finding, infrastructure_failure, misconfigured, ok, warning
from launch.doctor.place import Place
from launch.doctor.rendezvous import Rendezvous

if TYPE_CHECKING:
    import torch

CHECK = "all-reduce"
_ELEMENTS = 1 << 16
_SIZES = (1 << 12, 1 << 20, 1 << 24, 1 << 26)  # bytes
_GPU_SIZES = (*_SIZES, 1 << 28)
_SECONDS_PER_SIZE = 0.3
_PAIR_BYTES = 1 << 22
_MOST_ROUNDS = 31
_UUID = 64  # bytes for the identifier of a GPU
SLOW_NETWORK = 0.1e9  # bytes per second: a network of 1 Gbit/s
SLOWER = 0.6
"""A node is reported as slow below this fraction of the others' median."""


def check(place: Place, rendezvous: Rendezvous, *, on_gpu: bool, seconds: float) -> list[Finding]:
    """All checks of this file that the level asks for."""
    start_group(place, rendezvous, on_gpu=on_gpu, seconds=seconds)
    if on_gpu and (found := own_gpus(place)):
        return found if place.world.rank == 0 else []
    findings = correct(place, on_gpu=on_gpu)
    if not place.full:
        return findings
    nodes = len(rendezvous.leaders)
    findings += bandwidth(place, on_gpu=on_gpu, nodes=nodes)
    between = pairs(place, rendezvous, on_gpu=on_gpu) if nodes > 1 else {}
    computed = compute_rates(place, on_gpu=on_gpu)
    if place.world.rank != 0:
        return findings
    by_node = {
        leader: min(
            rate
            for rank, rate in computed.items()
            if rendezvous.members[rank].node == rendezvous.members[leader].node
        )
        for leader in rendezvous.leaders
    }
    slow = [
        *slow_nodes(
            between, "exchanges data with other nodes", "GB/s", rendezvous.label,
            "check its network: link speed, duplex, errors (ethtool), and which interface is used",
        ),
        *slow_nodes(
            by_node, "multiplies matrices", "GFLOP/s", rendezvous.label,
            "check what else runs on it, its clock rate (power, heat), and its container's limits",
        ),
    ]  # fmt: skip
    if not slow and nodes > 1:
        pair, flops = min(between.values()) / 1e9, min(by_node.values()) / 1e9
        text = f"none: pairs exchange at least {pair:.3g} GB/s, each computes {flops:.3g} GFLOP/s"
        slow = [ok("slow node", text)]
    return findings + slow


def start_group(place: Place, rendezvous: Rendezvous, *, on_gpu: bool, seconds: float) -> None:
    """Starts the process group of all ranks, with the rendezvous's store."""
    import torch
    import torch.distributed as dist

    if place.world.on_one_host:
        use_loopback(os.environ)
    if on_gpu:
        torch.cuda.set_device(gpu_index(place.world, torch.cuda.device_count()))
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
        store=rendezvous.store,
        rank=place.world.rank,
        world_size=place.world.world_size,
        timeout=timedelta(seconds=seconds),
    )


def _device(*, on_gpu: bool) -> torch.device:
    """The device that ``start_group`` has chosen."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def own_gpus(place: Place) -> list[Finding]:
    """A failure, on all ranks, if two of them have the same GPU, which NCCL refuses."""
    import torch
    import torch.distributed as dist

    own = str(torch.cuda.get_device_properties(_device(on_gpu=True)).uuid).encode()[:_UUID]
    mine = torch.tensor(list(own.ljust(_UUID)), dtype=torch.uint8)
    devices = [torch.empty_like(mine) for _ in range(place.world.world_size)]
    dist.all_gather(devices, mine, group=dist.new_group(backend="gloo"))
    return same_gpu([bytes(device.tolist()).decode().strip() for device in devices])


def same_gpu(devices: list[str]) -> list[Finding]:
    """A failure if two ranks have the same GPU, from the identifier of each rank's."""
    found = shared_gpu(devices)
    if not found:
        return []
    ranks, uuid = found
    return [
        misconfigured(
            CHECK,
            f"ranks {', '.join(map(str, ranks))} have the same GPU ({uuid})",
            "start at most one rank per GPU, and let the launcher set LOCAL_RANK, from 0 on each "
            "host",
        )
    ]


def correct(place: Place, *, on_gpu: bool) -> list[Finding]:
    """Whether a sum over all ranks is exact: the numbers are integers that fp32 represents."""
    import torch
    import torch.distributed as dist

    world = place.world
    device = _device(on_gpu=on_gpu)
    pattern = torch.arange(_ELEMENTS, device=device, dtype=torch.float32) % 251
    mine = pattern + world.rank
    dist.all_reduce(mine)
    expected = pattern * world.world_size + world.world_size * (world.world_size - 1) // 2
    wrong = int((mine != expected).sum())
    if wrong:
        return [
            infrastructure_failure(
                CHECK,
                f"rank {world.rank} got {wrong} of {_ELEMENTS} sums wrong",
                "memory or network of a node corrupts data: remove the node and test it",
            )
        ]
    if world.rank != 0:
        return []
    backend = "NCCL" if on_gpu else "gloo"
    return [ok(CHECK, f"{backend} sums correctly over {world.world_size} ranks")]


def bandwidth(place: Place, *, on_gpu: bool, nodes: int) -> list[Finding]:
    """Time and rate of all-reduces of several sizes. The rate is NCCL's bus bandwidth, bytes x
    2 (n - 1) / n / seconds, which can be compared between numbers of ranks n."""
    import torch

    world = place.world
    device = _device(on_gpu=on_gpu)
    factor = 2 * (world.world_size - 1) / world.world_size
    rates: dict[int, float] = {}
    summary = []
    for size in _GPU_SIZES if on_gpu else _SIZES:
        data = torch.zeros(size // 4, device=device)
        seconds = _seconds_per_call(data)
        rates[size] = size * factor / seconds
        summary.append(f"{readable(size)} {rates[size] / 1e9:.3g} GB/s ({seconds * 1e3:.3g} ms)")
    if world.rank != 0:
        return []
    values: dict[str, Any] = {f"bytes_per_second_at_{size}": rate for size, rate in rates.items()}
    if nodes > 1 and rates[max(rates)] < SLOW_NETWORK:
        return [
            warning(
                "bandwidth",
                f"{', '.join(summary)}: not faster than a network of 1 Gbit/s",
                "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the fast interface, and check "
                "its speed with ethtool; or communicate less often (batch.global_batch_size)",
                **values,
            )
        ]
    return [ok("bandwidth", ", ".join(summary), **values)]


def _seconds_per_call(data: torch.Tensor) -> float:
    """Mean over a number of calls that all ranks agree on."""
    import torch
    import torch.distributed as dist

    def once() -> float:
        started = time.perf_counter()
        dist.all_reduce(data)
        if data.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()  # creates connections and buffers
    slowest = torch.tensor(once(), device=data.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    calls = max(1, min(100, int(_SECONDS_PER_SIZE / max(1e-6, float(slowest)))))
    return sum(once() for _ in range(calls)) / calls


def pairs(place: Place, rendezvous: Rendezvous, *, on_gpu: bool) -> dict[int, float]:
    """Called on all ranks. Each node exchanges data with each other node, at most with
    ``_MOST_ROUNDS`` of them, and never with two at the same time. Returns the best rate of each
    node in bytes per second, by its first rank: a slow node is slow with all others."""
    import torch
    import torch.distributed as dist

    device = _device(on_gpu=on_gpu)
    mine, theirs = (torch.zeros(_PAIR_BYTES // 4, device=device) for _ in range(2))
    plan = rounds(rendezvous.leaders)[:_MOST_ROUNDS]
    rates = torch.zeros(place.world.world_size, len(plan), device=device)
    for number, round_ in enumerate(plan):
        peer = round_.get(place.world.rank)
        dist.barrier()
        if peer is None:
            continue
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            _exchange(mine, theirs, peer)
            seconds.append(time.perf_counter() - started)
        rates[place.world.rank, number] = 2 * _PAIR_BYTES / min(seconds)
    dist.all_reduce(rates)
    measured: list[list[float]] = rates.tolist()
    return {
        # Of the two measurements of a pair, the one that started later misses a part.
        leader: max(
            min(measured[leader][number], measured[round_[leader]][number])
            for number, round_ in enumerate(plan)
            if leader in round_
        )
        for leader in rendezvous.leaders
    }


def _exchange(mine: torch.Tensor, theirs: torch.Tensor, peer: int) -> None:
    import torch
    import torch.distributed as dist

    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
    ):
        work.wait()
    if mine.is_cuda:
        torch.cuda.synchronize()


def rounds(ranks: Sequence[int]) -> list[dict[int, int]]:
    """All pairs in the fewest rounds, each rank at most once per round (the circle method of
    round-robin tournaments). Each round maps a rank to its partner."""
    circle: list[int | None] = [*ranks] + ([None] if len(ranks) % 2 else [])
    half, found = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        round_: dict[int, int] = {}
        for one, other in zip(circle[:half], reversed(circle[half:]), strict=True):
            if one is not None and other is not None:
                round_ |= {one: other, other: one}
        found.append(round_)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def compute_rates(place: Place, *, on_gpu: bool) -> dict[int, float]:
    """Called on all ranks: each rank's floating-point operations per second in a product of
    matrices, measured on all at the same time."""
    import torch
    import torch.distributed as dist

    device = _device(on_gpu=on_gpu)
    side = 4096 if on_gpu else 512
    matrix = torch.ones(side, side, device=device)
    rates = torch.zeros(place.world.world_size, device=device)
    dist.barrier()
    best, until = 0.0, time.perf_counter() + _SECONDS_PER_SIZE
    while not best or time.perf_counter() < until:
        started = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    rates[place.world.rank] = best
    dist.all_reduce(rates)
    return dict(enumerate(rates.tolist()))


def slow_nodes(
    rates: Mapping[int, float], what: str, unit: str, label: Callable[[int], str], advice: str
) -> list[Finding]:
    """A warning for each node that is much slower than the median of the others."""
    findings = []
    for rank, rate in rates.items():
        others = [value for other, value in rates.items() if other != rank]
        if others and rate < SLOWER * (usual := statistics.median(others)):
            findings.append(
                warning(
                    "slow node",
                    f"{what} at {rate / 1e9:.3g} {unit}; the others reach {usual / 1e9:.3g}",
                    advice,
                    node=label(rank),
                    rate_per_second=rate,
                )
            )
    return findings
