"""Where a run waits in a queue of Kueue, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]


def queue_note(job: Object, workloads: Sequence[Object]) -> str | None:
    """A sentence about the queue of a Job, JobSet or TrainJob, or of the owner of a JobSet; None if
    it is in none, or admitted. ``workloads`` are Kueue's, of the namespace."""
    metadata = job["metadata"]
    owners = {metadata.get("uid"), *_owners(job)} - {None}
    own = next((w for w in workloads if owners & _owners(w)), None)
    if own is None or not _waits(own):
        return None
    queue = own["spec"].get("queueName")
    line = sorted(
        (w for w in workloads if w["spec"].get("queueName") == queue and _waits(w)), key=_order
    )
    text = f"Waits in the queue {queue}, position {line.index(own) + 1} of {len(line)} in this "
    text += "namespace"
    if preempted := _condition(own, "Evicted", "True"):
        text += f"; {_told(preempted)}"
    if reason := _condition(own, "QuotaReserved", "False"):
        text += f"; {_told(reason)}"
    return text


def _owners(made: Object) -> set[str | None]:
    return {owner.get("uid") for owner in made["metadata"].get("ownerReferences") or []}


def _order(workload: Object) -> tuple[int, str]:
    """Kueue admits by priority, then by age."""
    return -int(workload["spec"].get("priority") or 0), workload["metadata"]["creationTimestamp"]


def _waits(workload: Object) -> bool:
    over = _condition(workload, "Finished", "True")
    return not over and not _condition(workload, "Admitted", "True")


def _condition(workload: Object, kind: str, status: str) -> Object | None:
    found = (workload.get("status") or {}).get("conditions") or []
    return next((c for c in found if (c["type"], c["status"]) == (kind, status)), None)


def _told(condition: Object) -> str:
    text = f"{condition.get('reason')}: {condition.get('message')}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_LONGEST = 400
"""Characters of a message: Kueue lists each flavor of each queue."""
