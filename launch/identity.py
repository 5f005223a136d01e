"""Who a run is: made once, at its submission, and handed down to all that it starts.

What is handed down are environment variables, so that every retry by the scheduler, every node
and every rank is the same run. ``train`` takes them at the run's birth and keeps them in the run
directory (run.json). Submitted again, a run whose directory can be seen from here keeps the
identity that it has; where the directory is out of sight ``train`` keeps it all the same, and the
new id is only that of the launch.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """A run's names."""

    run_id: str
    wandb_id: str
    group: str
    """What W&B groups it under: the same for all runs of one name, and so for all their starts."""
    job_type: str
    """fit, sweep, doctor or run."""

    def environment(self) -> dict[str, str]:
        """The variables that hand it down."""
        return {
            "ISORUN_RUN_ID": self.run_id,
            "WANDB_RUN_ID": self.wandb_id,
            "WANDB_RUN_GROUP": self.group,
            "WANDB_JOB_TYPE": self.job_type,
        }


def identify(name: str, job_type: str, run_directory: Path | None = None) -> Identity:
    """The identity of the run in a directory, or else a new one."""
    born = _born(run_directory) if run_directory else None
    run_id, wandb_id = born or (new_id(name),) * 2
    return Identity(run_id, wandb_id, name, job_type)


def new_id(name: str) -> str:
    """An id that nobody else has, and that works in file names and with W&B."""
    return f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def slug(name: str) -> str:
    """Letters, digits, ``_`` and ``-`` of a name; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"


def _born(run_directory: Path) -> tuple[str, str] | None:
    """What run.json says. A damaged one is left to ``train``, which refuses it with a reason."""
    try:
        values = json.loads((run_directory / "run.json").read_text(encoding="utf-8"))
        return str(values["id"]), str(values["wandb_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
