"""Tells an error of this process from one that only says that another process is gone."""

from __future__ import annotations

import sys

LOST_PEER = (
    "Another rank has ended or cannot be reached, so this one cannot go on; the other's own "
    "message says why. Start the run again to go on from its last checkpoint."
)
# What gloo says in plain RuntimeErrors.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection refused",
    "connectFullMesh failed",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed for want of another rank."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return "gloo" in text.lower() and any(sign in text for sign in _SIGNS)
