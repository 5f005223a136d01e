"""The tables of a profile, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.profiling.trace import SHARES, Operator, Profile

LABELS = {
    "data": "data wait",
    "compute": "compute",
    "communication": "communication",
    "host": "host and other",
}
_COLUMNS = 8
"""The most ranks that have a column each."""


def table(profile: Profile, ranks: Mapping[int, Mapping[str, float]], top: int) -> str:
    """The shares of a step, and the ``top`` operators. ``ranks`` has the shares of all ranks that
    have recorded."""
    where = f"rank {profile.rank} of {profile.world_size}, " if profile.world_size > 1 else ""
    lines = [f"{where}{profile.steps} steps, {_time(profile.step_seconds)} per step", ""]
    lines += _shares(profile, ranks)
    per_step = profile.step_seconds * profile.steps
    lines += ["", *_operators("operator (CPU)", profile.operators[:top], per_step)]
    if profile.kernels:
        lines += ["", *_operators("kernel (GPU)", profile.kernels[:top], per_step)]
    return "\n".join(lines)


def _shares(profile: Profile, ranks: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    few = len(ranks) <= _COLUMNS
    if few:
        heads = [f"rank {rank}" for rank in sorted(ranks)] if len(ranks) > 1 else ["share"]
    else:
        heads = ["mean", "least", "most"]
    yield f"{'part of a step':<18}{'per step':>12}" + "".join(f"{head:>10}" for head in heads)
    for name in SHARES:
        values = [ranks[rank][name] for rank in sorted(ranks)]
        if not few:
            values = [sum(values) / len(values), min(values), max(values)]
        cells = "".join(f"{f'{100 * value:.1f} %':>10}" for value in values)
        seconds = profile.shares[name] * profile.step_seconds
        yield f"{LABELS[name]:<18}{_time(seconds):>12}{cells}"


def _operators(head: str, operators: Sequence[Operator], total: float) -> Iterator[str]:
    yield f"{head:<58}{'calls':>8}{'self time':>12}{'of steps':>10}"
    for name, calls, seconds in operators:
        short = name if len(name) <= 56 else f"{name[:53]}..."
        share = f"{100 * seconds / total:.1f} %"
        yield f"{short:<58}{calls:>8}{_time(seconds):>12}{share:>10}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def to_json(profile: Profile, ranks: Mapping[int, Mapping[str, float]], top: int) -> dict[str, Any]:
    """The same values for programs; times in seconds, shares from 0 to 1."""
    return {
        "rank": profile.rank,
        "world_size": profile.world_size,
        "steps": profile.steps,
        "step_seconds": profile.step_seconds,
        "shares": profile.shares,
        "ranks": {str(rank): dict(shares) for rank, shares in sorted(ranks.items())},
        "operators": [operator._asdict() for operator in profile.operators[:top]],
        "kernels": [kernel._asdict() for kernel in profile.kernels[:top]],
    }
