"""The failure records of agents: JSON in a run directory's ``failures/`` and, in containers, in the
termination message.

``exit_code``, ``what`` (the exit code in words), ``retry``, ``advice``, ``first`` (the rank that
failed first: rank, host, error, log ...), ``others`` and ``lost_nodes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(record: Mapping[str, Any]) -> str:
    """The rank that failed first, and its exit code in words; no full stop. Raises KeyError or
    TypeError if the record is incomplete."""
    first = record["first"]
    return f"Rank {first['rank']} on {first['host']} ended first: {record['what']}"
