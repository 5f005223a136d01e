"""How far a run has got, from the end of its pods' logs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from launch.contract import RunError
from launch.kubernetes import logs, state
from launch.kubernetes.cluster import Cluster

_STEP = re.compile(r"step (\d+)/(\d+)\b")  # the start of the line that rank 0 logs
_LINES = 100
_PODS = 8
"""Of how many pods the log is read, since rank 0 can be in any of them."""


def progress_note(cluster: Cluster, pods: Sequence[dict[str, Any]]) -> str | None:
    """A sentence about the last step that was logged; None if none is found."""
    running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
    for pod in sorted(running, key=state.node)[:_PODS]:
        with suppress(RunError):
            name, container = pod["metadata"]["name"], state.container(pod)
            lines = list(cluster.log(name, container, follow=False, since=None, tail=_LINES))
            for line in reversed(lines):
                if found := _STEP.match(line.partition(" ")[2]):
                    return f"Step {found[1]} of {found[2]}{_age(logs.time_of(line))}"
    return None


def _age(when: datetime | None) -> str:
    if when is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - when).total_seconds())
    return f", logged {seconds:.0f} s ago"
