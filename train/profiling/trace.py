"""What a trace of torch.profiler says: the operators that take most time, and the share of a step
that is data, compute, communication and host.

The events are those of Chrome's trace format as torch.profiler writes them: ``cat`` is ``cpu_op``
for operators, ``kernel``, ``gpu_memcpy`` and ``gpu_memset`` for the GPU, ``user_annotation`` for
marks, of which ``ProfilerStep#N`` are the steps and ``isorun.PHASE`` those of the loop. ``ts`` and
``dur`` are in microseconds.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train.exits import DataError
from train.files import open_regular
from train.json_files import is_number, parse_object
from train.profiling.intervals import Intervals, difference, intersection, length, union

SHARES = ("data", "compute", "communication", "host")
"""What the time of a step is divided into."""
LIMIT = 2 << 30
"""The largest size, in bytes, of the JSON of a trace that is read."""
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Operators that contain others, or that only start or wait for an exchange between ranks.
_WRAPPERS = ("autograd::", "torch::autograd::", "c10d::", "_c10d_functional::")


class Operator(NamedTuple):
    """An operator or a kernel, over all recorded steps."""

    name: str
    calls: int
    seconds: float
    """Without the operators that it calls."""


@dataclass(frozen=True)
class Profile:
    """The summary of a trace."""

    rank: int
    world_size: int
    steps: int
    step_seconds: float
    """Mean time of a recorded step."""
    shares: dict[str, float]
    """The part of the time, from 0 to 1, of each of ``SHARES``. Their sum is 1."""
    operators: list[Operator] = field(default_factory=list)
    """On the CPU, by their own time, the longest first."""
    kernels: list[Operator] = field(default_factory=list)
    """On the GPU; empty without one."""


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    category: str
    thread: tuple[str, str]


def read_profile(path: Path) -> Profile:
    """The summary of a trace file. Raises DataError for one that cannot be read, or OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            unpacked = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            data = unpacked.read(LIMIT + 1)
            if len(data) > LIMIT:
                raise ValueError(f"it has more than {LIMIT >> 30} GiB")
            return summarize(parse_object(data, {"traceEvents": list}))
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path} is no trace of torch.profiler that can be read ({error}); record it again."
            ) from None


def summarize(trace: Mapping[str, Any]) -> Profile:
    """The summary of a trace. Raises ValueError if no step is marked in it."""
    events = [e for e in map(_event, trace["traceEvents"]) if e]
    marks = [e for e in events if e.category == "user_annotation"]
    steps = [e for e in marks if e.name.startswith("ProfilerStep#")]
    window = union((e.start, e.end) for e in steps)
    if not window:
        raise ValueError("it has no step")
    place = trace.get("distributedInfo")
    place = place if isinstance(place, dict) else {}
    return Profile(
        rank=_whole(place.get("rank"), 0),
        world_size=_whole(place.get("world_size"), 1),
        steps=len(steps),
        step_seconds=length(window) / len(steps) / 1e6,
        shares=_shares(events, window),
        operators=_by_name(_own_times(e for e in events if e.category == "cpu_op")),
        kernels=_by_name((e.name, e.end - e.start) for e in events if e.category in _DEVICE),
    )


def _event(values: object) -> _Event | None:
    """A complete event; None for others, and for what is damaged."""
    if not isinstance(values, dict) or values.get("ph") != "X":
        return None
    start, duration, name = values.get("ts"), values.get("dur", 0), values.get("name")
    if not (is_number(start) and is_number(duration) and isinstance(name, str) and duration >= 0):
        return None
    thread = str(values.get("pid")), str(values.get("tid"))
    return _Event(start, start + duration, name, str(values.get("cat")), thread)


def _whole(value: object, default: int) -> int:
    return value if type(value) is int and value >= 0 else default


def _shares(events: list[_Event], window: Intervals) -> dict[str, float]:
    """Each moment of the steps belongs to one share. With a GPU, what it does counts, and the host
    only while the GPU does nothing; without one, what the main thread waits for counts first."""

    def during(chosen: Iterable[_Event]) -> Intervals:
        return intersection(union((e.start, e.end) for e in chosen), window)

    def marked(phase: str) -> Intervals:
        name = f"isorun.{phase}"
        return during(e for e in events if e.category == "user_annotation" and e.name == name)

    data, waiting = marked("data"), marked("wait")
    device = [e for e in events if e.category in _DEVICE]
    if device:
        exchanges = during(e for e in device if _is_exchange(e))
        compute = during(e for e in device if not _is_exchange(e))
        communication = difference(exchanges, compute)
        data = difference(data, union([*compute, *communication]))
        idle = difference(waiting, union([*compute, *communication, *data]))
        communication = union([*communication, *idle])
    else:
        compute = difference(during(e for e in events if _computes(e)), data)
        exchanges = during(e for e in events if e.name.startswith("gloo:"))
        # The ranks exchange the count of the batch beside the forward pass, which does not wait
        # for it; other exchanges in it gather parameters, for which it waits.
        beside = during(e for e in events if e.name == "gloo:all_reduce")
        exchanges = difference(exchanges, intersection(beside, marked("forward")))
        communication = difference(union([*exchanges, *waiting]), union([*compute, *data]))
    total = length(window)
    shares = {
        "data": length(data) / total,
        "compute": length(compute) / total,
        "communication": length(communication) / total,
    }
    return {**shares, "host": max(0.0, 1.0 - sum(shares.values()))}


def _is_exchange(event: _Event) -> bool:
    return "nccl" in event.name.lower()


def _computes(event: _Event) -> bool:
    """Whether an event is an operator of the CPU that computes, or a region that was compiled."""
    if event.category != "cpu_op" or event.name.startswith(_WRAPPERS):
        return False
    return "::" in event.name or "Compiled" in event.name


def _own_times(events: Iterable[_Event]) -> list[tuple[str, float]]:
    """The time of each operator without those inside it, on the same thread."""
    by_thread: dict[tuple[str, str], list[_Event]] = defaultdict(list)
    for event in events:
        by_thread[event.thread].append(event)
    found = []
    for thread in by_thread.values():
        own: list[float] = []
        open_events: list[tuple[float, int]] = []  # end, and index in own
        thread.sort(key=lambda e: (e.start, -e.end))
        for index, event in enumerate(thread):
            while open_events and open_events[-1][0] <= event.start:
                open_events.pop()
            if open_events:
                own[open_events[-1][1]] -= event.end - event.start
            own.append(event.end - event.start)
            open_events.append((event.end, index))
        found += [(e.name, max(0.0, t)) for e, t in zip(thread, own, strict=True)]
    return found


def _by_name(times: Iterable[tuple[str, float]]) -> list[Operator]:
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for name, microseconds in times:
        calls[name] += 1
        total[name] += microseconds
    found = [Operator(name, calls[name], total[name] / 1e6) for name in total]
    return sorted(found, key=lambda o: (-o.seconds, o.name))
