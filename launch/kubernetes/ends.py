"""How the attempts of a JobSet ended, whose pods are gone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]
REASONS = (
    "PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded", "MaxFailedIndexesExceeded",
    "FailedIndexes",
)  # fmt: skip
"""Why a Job fails, in its events."""
_MOST = 5
_CODE = re.compile(r"Container \S+ for pod [^/\s]+/(\S+) failed with (exit code \d+) matching ")
_DISRUPTED = re.compile(r"Pod [^/\s]+/(\S+) has condition DisruptionTarget matching ")


def ends_note(jobset: Object, events: Sequence[Object]) -> str | None:
    """A sentence about the newest ends; ``events`` are the failures of the Jobs in a JobSet, also
    of an earlier one with the same name, the oldest first."""
    created = str(jobset["metadata"].get("creationTimestamp") or "")
    events = [event for event in events if last_time(event) >= created]
    if not events:
        return None
    newest = [f"{_time(event)} {_end(event)}" for event in events[-_MOST:]]
    left = len(events) - len(newest)
    return f"Attempts ended: {'; '.join(newest)}{f'; and {left} before' if left else ''}"


def last_time(event: Object) -> str:
    """When it was last seen, as the API gives it."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def _time(event: Object) -> str:
    return last_time(event).partition(".")[0].removesuffix("Z").replace("T", " ")


def _end(event: Object) -> str:
    message = str(event.get("message") or "")
    if found := _CODE.match(message):
        return f"{found[2]} in the pod {found[1]}"
    if found := _DISRUPTED.match(message):
        return f"disruption (such as a drain, eviction or preemption) of the pod {found[1]}"
    return f"{event['reason']}: {message}".rstrip(": .")
