"""The tables of ``isorun goodput``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from train.exits import Exit
from train.goodput.phases import LABELS
from train.goodput.read import AttemptTime, Goodput


def table(goodput: Goodput, price_per_hour: float | None = None) -> str:
    """A line per phase, the goodput, the costs if there is a price, and a line per attempt."""
    wall = goodput.wall
    lines = [f"{'phase':<24}{'seconds':>12}{'percent':>10}"]
    for name, label in LABELS.items():
        seconds = goodput.seconds[name]
        lines.append(f"{label:<24}{seconds:>12,.1f}{_percent(seconds, wall):>10}")
    lines.append(f"{'wall time':<24}{wall:>12,.1f}{_percent(wall, wall):>10}")
    lines += [
        "",
        f"goodput: {goodput.percent:.1f} % ({goodput.seconds['compute']:,.1f} s of committed "
        f"compute in {wall:,.1f} s{' so far' if goodput.running else ''})",
    ]
    if price_per_hour is not None:
        run, lost = costs(goodput, price_per_hour)
        lines.append(
            f"cost: {run:,.2f} for {goodput.held / 3600:,.2f} h of attempts at {price_per_hour:g} "
            f"per hour, of which {lost:,.2f} for lost work"
        )
    return "\n".join([*lines, "", *_attempts(goodput)])


def _attempts(goodput: Goodput) -> Iterator[str]:
    widths = "{:>7}  {:<19}  {:<19}  {:<20}{:>9}{:>11}{:>6}"
    yield widths.format(
        "attempt", "start", "end", "exit", "from step", "committed", "lost"
    ).rstrip()
    for attempt in goodput.attempts:
        is_running = goodput.running and attempt is goodput.attempts[-1]
        yield widths.format(
            attempt.attempt,
            _at(attempt.started),
            "in progress" if is_running else _at(attempt.ended),
            "" if is_running else described_exit(attempt),
            attempt.resumed,
            attempt.committed,
            attempt.lost,
        )


def described_exit(attempt: AttemptTime) -> str:
    """The exit code with its name; a killed process has recorded none."""
    if attempt.exit is None:
        return "not recorded"
    known = attempt.exit in list(Exit)
    return f"{attempt.exit} {Exit(attempt.exit).name}" if known else str(attempt.exit)


def costs(goodput: Goodput, price_per_hour: float) -> tuple[float, float]:
    """The cost of all attempts, and of the work that they have lost."""
    lost = goodput.seconds["lost"]
    return price_per_hour * goodput.held / 3600, price_per_hour * lost / 3600


def to_json(goodput: Goodput, price_per_hour: float | None = None) -> dict[str, Any]:
    """The same values for programs; times in seconds, those of the attempts since the epoch."""
    values: dict[str, Any] = {
        "running": goodput.running,
        "percent": goodput.percent,
        "wall_seconds": goodput.wall,
        "lost_steps": goodput.lost_steps,
        "seconds": dict(goodput.seconds),
        "attempts": [
            {**vars(attempt), "seconds": dict(attempt.seconds)} for attempt in goodput.attempts
        ],
    }
    if price_per_hour is not None:
        run, lost = costs(goodput, price_per_hour)
        values |= {"price_per_hour": price_per_hour, "cost": run, "cost_of_lost_work": lost}
    return values


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
