"""Formats numbers for people."""

from __future__ import annotations


def readable(count: float) -> str:
    """A number of bytes in the largest binary unit of which it is at least 1."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            value = count / (1 << power)
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"
