"""The failure records of agents: JSON in a run directory's ``failures/`` and, in containers, in the
termination message.

``exit_code``, ``what`` (the exit code in words), ``retry``, ``advice``, ``first`` (the rank that
failed first: rank, host, error, log ...; -1 is the agent itself), ``others`` and ``lost_nodes``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.contract import AGENT_RANK, FAILURES, Fields, has_fields, read_object

_FIELDS: Fields = {
    "time": (int, float), "exit_code": int, "what": str, "retry": bool, "first": dict,
    "others": list, "lost_nodes": list,
}  # fmt: skip
_FIRST: Fields = {"rank": int, "host": str, "error": str, "log": list}
_OTHER: Fields = {"rank": int, "exit_code": int}


def is_complete(record: object) -> bool:
    """Whether a value read from a file of ``failures/`` is a record with all of its fields."""
    return (
        has_fields(record, _FIELDS)
        and has_fields(record["first"], _FIRST)
        and all(has_fields(other, _OTHER) for other in record["others"])
    )


def last_record(directory: Path, before: float = math.inf) -> dict[str, Any] | None:
    """The newest complete record of a run directory from before a time (seconds since the epoch);
    None without one."""
    for file in sorted((directory / FAILURES).glob("*.json"), reverse=True):
        with suppress(OSError, ValueError):
            if is_complete(record := read_object(file)) and record["time"] < before:
                return record
    return None


def sentence(record: Mapping[str, Any]) -> str:
    """The headline and the error; no full stop. Raises KeyError or TypeError if the record is
    incomplete."""
    error = record["first"]["error"]
    return f"{headline(record)}, {error}" if error else headline(record)


def headline(record: Mapping[str, Any]) -> str:
    """Who ended first, a rank or the agent, and the exit code in words; no full stop. Raises
    KeyError or TypeError if the record is incomplete."""
    first = record["first"]
    who = f"The agent on {first['host']} ended"
    if first["rank"] != AGENT_RANK:
        who = f"Rank {first['rank']} on {first['host']} ended first"
    return f"{who}: {record['what']}"
