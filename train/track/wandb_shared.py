"""W&B's shared mode, in which several processes write to one run: one of them is the primary."""

from __future__ import annotations

import socket

NO_SHARED_MODE = "this version of wandb has no shared mode; install wandb 0.20 or newer"


def has_shared_mode() -> bool:
    """Whether the wandb that is installed lets several processes write to one run."""
    import wandb

    return "x_update_finish_state" in type(wandb.Settings()).model_fields


def node_label(rank: int) -> str:
    """What W&B calls the metrics of the node on which this process runs, as a rank."""
    return f"{socket.gethostname()}-rank-{rank}"
