"""The ids of a run, chosen when it is submitted and passed to all of its processes.

They are environment variables, so that every retry of the scheduler, every node and every rank is
part of the same run. A new run stores them in its run directory (run.json), and later starts read
them there. If that file is visible at submission, its ids are used; otherwise a new id is made,
which names the launch only, and the run keeps the id of its run.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.contract import RUN_FILE, RUN_ID, WANDB_GROUP, WANDB_ID, new_run_id, read_object

JOB_TYPE = "WANDB_JOB_TYPE"


@dataclass(frozen=True)
class RunIds:
    """The names under which a run is known."""

    run_id: str
    wandb_id: str
    group: str
    """The W&B group: the run's name, the same for every start."""
    job_type: str
    """The W&B job type: fit, sweep, doctor or run."""

    def environment(self) -> dict[str, str]:
        """The environment variables that pass them on."""
        return {
            RUN_ID: self.run_id,
            WANDB_ID: self.wandb_id,
            WANDB_GROUP: self.group,
            JOB_TYPE: self.job_type,
        }


def ids_of_run(name: str, job_type: str, run_directory: Path | None = None) -> RunIds:
    """The ids stored in a run directory, or new ones."""
    stored = _stored(run_directory) if run_directory else None
    run_id, wandb_id = stored or (new_run_id(name),) * 2
    return RunIds(run_id, wandb_id, name, job_type)


def _stored(run_directory: Path) -> tuple[str, str] | None:
    """The ids in run.json; None if it is missing or damaged: ``train`` reports a damaged one."""
    try:
        values = read_object(run_directory / RUN_FILE, {"id": str, "wandb_id": str})
        return values["id"], values["wandb_id"]
    except (OSError, ValueError):
        return None
