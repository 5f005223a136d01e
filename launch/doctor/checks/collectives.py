"""The all-reduce that a training lives by: right, how fast, and who slows it down.

On GPUs it is NCCL's, on the CPU gloo's, as in a training. All ranks take part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.doctor.checks.units import readable
from launch.doctor.findings import Finding, broken, ok, warning
from launch.doctor.meeting import Meeting
from launch.doctor.place import Place

if TYPE_CHECKING:
    import torch

CHECK = "all-reduce"
_ELEMENTS = 1 << 16
_SIZES = (1 << 12, 1 << 20, 1 << 24, 1 << 26)  # bytes
_GPU_SIZES = (*_SIZES, 1 << 28)
_SECONDS_PER_SIZE = 0.3
_PAIR_BYTES = 1 << 22
_MOST_ROUNDS = 31
SLOW_NETWORK = 0.1e9  # bytes per second: a network of 1 Gbit/s
SLOWER = 0.6
"""A node below this share of what the others reach is named."""


def start_group(place: Place, meeting: Meeting, *, on_gpu: bool, seconds: float) -> None:
    """The process group of all ranks, over the meeting's store."""
    import torch
    import torch.distributed as dist

    if on_gpu:
        torch.cuda.set_device(place.world.local_rank)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
        store=meeting.store,
        rank=place.world.rank,
        world_size=place.world.world_size,
        timeout=timedelta(seconds=seconds),
    )


def correct(place: Place, *, on_gpu: bool) -> list[Finding]:
    """Whether a sum over all ranks is what arithmetic says, to the bit: the numbers are whole and
    small enough for fp32."""
    import torch
    import torch.distributed as dist

    world = place.world
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    pattern = torch.arange(_ELEMENTS, device=device, dtype=torch.float32) % 251
    mine = pattern + world.rank
    dist.all_reduce(mine)
    expected = pattern * world.world_size + world.world_size * (world.world_size - 1) // 2
    wrong = int((mine != expected).sum())
    if wrong:
        return [
            broken(
                CHECK,
                f"rank {world.rank} got {wrong} of {_ELEMENTS} sums wrong",
                "memory or network of a node corrupts data: take it out, and have it tested",
            )
        ]
    if world.rank != 0:
        return []
    backend = "NCCL" if on_gpu else "gloo"
    return [ok(CHECK, f"{backend} sums correctly over {world.world_size} ranks")]


def bandwidth(place: Place, *, on_gpu: bool, nodes: int) -> list[Finding]:
    """Time and rate of all-reduces of several sizes. The rate is NCCL's bus bandwidth: bytes
    times 2 (n - 1) / n by seconds, which does not depend on the number n of ranks."""
    import torch

    world = place.world
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    factor = 2 * (world.world_size - 1) / world.world_size
    rates: dict[int, float] = {}
    said = []
    for size in _GPU_SIZES if on_gpu else _SIZES:
        data = torch.zeros(size // 4, device=device)
        seconds = _seconds_per_call(data)
        rates[size] = size * factor / seconds
        said.append(f"{readable(size)} {rates[size] / 1e9:.3g} GB/s ({seconds * 1e3:.3g} ms)")
    if world.rank != 0:
        return []
    values: dict[str, Any] = {f"bytes_per_second_at_{size}": rate for size, rate in rates.items()}
    if nodes > 1 and rates[max(rates)] < SLOW_NETWORK:
        return [
            warning(
                "bandwidth",
                f"{', '.join(said)}: no more than a network of 1 Gbit/s",
                "name the fast interface by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, and see "
                "its speed with ethtool; or let steps take longer (batch.global_batch_size)",
                **values,
            )
        ]
    return [ok("bandwidth", ", ".join(said), **values)]


def _seconds_per_call(data: torch.Tensor) -> float:
    """Mean over as many calls as all ranks agree to make."""
    import torch
    import torch.distributed as dist

    def once() -> float:
        started = time.perf_counter()
        dist.all_reduce(data)
        if data.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()  # connections and buffers are made
    slowest = torch.tensor(once(), device=data.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    calls = max(1, min(100, int(_SECONDS_PER_SIZE / max(1e-6, float(slowest)))))
    return sum(once() for _ in range(calls)) / calls


def pairs(place: Place, meeting: Meeting, *, on_gpu: bool) -> dict[int, float]:
    """Called on all ranks. Each node exchanges data with each other one (of many nodes: with
    ``_MOST_ROUNDS``), no node with two at the same time. Returns the best rate
    of each node in bytes per second, by its first rank: a slow node is slow with all others."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", place.world.local_rank) if on_gpu else torch.device("cpu")
    mine, theirs = (torch.zeros(_PAIR_BYTES // 4, device=device) for _ in range(2))
    plan = rounds(meeting.leaders)[:_MOST_ROUNDS]
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
    seen: list[list[float]] = rates.tolist()
    return {
        # Of the two who measured a pair, the one who began later saw less of it.
        leader: max(
            min(seen[leader][number], seen[round_[leader]][number])
            for number, round_ in enumerate(plan)
            if leader in round_
        )
        for leader in meeting.leaders
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
    """All pairs in as few rounds as there can be, each rank once in a round (the circle method of
    round-robin tournaments). Each round maps a rank to its partner; an odd one out is missing."""
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
    """Called on all ranks: how many floating-point operations per second each does, all at the
    same time, in the product of matrices."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", place.world.local_rank) if on_gpu else torch.device("cpu")
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


def slow_ones(
    rates: Mapping[int, float], what: str, unit: str, label: Callable[[int], str], advice: str
) -> list[Finding]:
    """A warning for each that is much slower than the median of the others."""
    findings = []
    for rank, rate in rates.items():
        others = [value for other, value in rates.items() if other != rank]
        if others and rate < SLOWER * (usual := statistics.median(others)):
            findings.append(
                warning(
                    "slow node",
                    f"{what} at {rate / 1e9:.3g} {unit}, where the others reach {usual / 1e9:.3g}",
                    advice,
                    node=label(rank),
                    rate_per_second=rate,
                )
            )
    return findings
