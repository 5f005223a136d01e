"""The state of a run in the words of a report."""

from __future__ import annotations

from typing import NamedTuple

from train.runs.state import Condition

_TEXTS = {
    "new": "no attempt is recorded",
    "running": "in progress",
    "hung": "hung: a rank sends no heartbeats, or the watchdog ended the run",
    "stopped": "stopped on request",
    "finished": "finished",
    "failed": "failed",
    "dead": "ended without a recorded exit: killed, or its machine was lost",
    "unreadable": "its files are damaged",
}


class State(NamedTuple):
    """The state of a run."""

    kind: str
    """One of ``train.runs.state.STATES``."""
    text: str
    """The same in words."""
    reason: str = ""
    """Why the last attempt ended, where that is recorded."""
    code: int | None = None
    """The exit code of the last attempt."""


def in_words(found: Condition) -> State:
    """The state, with the end of the last attempt where the run is not in progress."""
    text = _TEXTS[found.state]
    if found.state == "running" or found.end is None:
        return State(found.state, text)
    code, reason = found.end.code, found.end.reason[:2000]
    if found.state in ("stopped", "failed"):
        text += f" (exit code {code})"
    return State(found.state, text, "" if found.state == "finished" else reason, code)
