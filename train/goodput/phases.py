"""The phases that the time of a run is divided into."""

from __future__ import annotations

from typing import Literal

Phase = Literal[
    "start", "rendezvous", "restore", "compile", "data", "forward", "compute", "wait",
    "checkpoint", "evaluation", "shutdown",
]  # fmt: skip
"""What the main thread of a rank does. ``forward`` is the part of ``compute`` that stragglers are
found by; the ledger has their sum."""

WORK = ("data", "compute", "wait")
"""The phases of a step: their time is lost with the step."""

LABELS = {
    "queued": "queued",
    "start": "start-up",
    "rendezvous": "rendezvous",
    "restore": "restore",
    "compile": "compile",
    "data": "data wait",
    "compute": "compute",
    "wait": "waiting for other ranks",
    "checkpoint": "checkpoint stall",
    "evaluation": "evaluation",
    "shutdown": "shutdown",
    "lost": "lost work",
    "idle": "idle between attempts",
}
"""Everything that the wall time of a run is divided into, and its name in tables. ``queued``,
``lost`` and ``idle`` are no phases of a process: they are known afterwards."""

RECORDED = tuple(name for name in LABELS if name not in ("queued", "lost", "idle"))
"""The phases in the ledger."""


def flush_interval(elapsed: float) -> float:
    """Seconds from one line of the ledger to the next, ``elapsed`` seconds after the start of the
    attempt: at most 0.5 % of its time is missing after a kill, once it is older than 200 s."""
    return min(300.0, max(1.0, elapsed / 200))
