"""What a Slurm job may not inherit from the shell that submits it.

In an allocation that shell has variables for its tasks: their number, memory and CPU masks. sbatch
and srun read such variables as options, so a job submitted from there would get them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI")
_CLIENT = {
    "SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_DEBUG_FLAGS", "SLURM_JWT",
    "SLURM_TIME_FORMAT",
}  # fmt: skip
"""Settings of Slurm's commands."""
_USERS = {
    "account": "ACCOUNT", "clusters": "CLUSTERS", "constraint": "CONSTRAINT",
    "partition": "PARTITION", "qos": "QOS", "reservation": "RESERVATION", "time": "TIMELIMIT",
    "wckey": "WCKEY",
}  # fmt: skip
"""Options that users set for all their jobs, as SBATCH_<NAME>; Slurm itself sets none of them."""


def for_submission(environ: Mapping[str, str], options: Iterable[str]) -> dict[str, str]:
    """The environment for sbatch. ``options`` are those of the batch file, over which sbatch would
    prefer a variable."""
    kept = _CLIENT | {f"SBATCH_{_USERS[name]}" for name in _USERS.keys() - set(options)}
    return {
        name: value
        for name, value in environ.items()
        if name in kept or not name.startswith(_PREFIXES)
    }
