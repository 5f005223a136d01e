"""How long a stop may take: ranks save, the agent reports, the launcher kills what is left.

All three count from the same request to stop, so each needs more time than the one before it::

                               stop deadline   shutdown timeout   grace period
                               of the ranks    of the agent       of the launcher
    agent's defaults           30 = 35 - 5     35
    local_cwd, local_docker    30              35                 45 = 35 + 10
    k8s/base/job.yaml          90              105 = 90 + 15      120 = 105 + 15
    configs/slurm/fit.sbatch   105 = 110 - 5   110                120 (Slurm may round down)

The YAML and the batch file hold the same numbers as text; tests compare them.
"""

from __future__ import annotations

SHUTDOWN_TIMEOUT = 35.0
"""Default of the agent's ``--shutdown-timeout``: seconds until it kills ranks that still run."""

AGENT_AFTER_RANKS = 5.0
"""Seconds between the ranks' deadline and the agent's timeout, to end and to report."""

LAUNCHER_AFTER_AGENT = 10.0
"""Seconds that a launcher on this machine gives an agent beyond its timeout."""

POD_AGENT_AFTER_RANKS = 15
"""The same margin in a pod, where ranks may write to network storage when they end."""

POD_AFTER_AGENT = 15
"""Seconds between the agent's timeout and the end of the pod's grace period."""


def stop_deadline(shutdown_timeout: float) -> float:
    """The ranks' deadline that an agent derives from its timeout. A timeout of less than twice the
    margin is halved instead, so that ranks have time left."""
    return max(shutdown_timeout - AGENT_AFTER_RANKS, shutdown_timeout / 2)


def grace_period(shutdown_timeout: float = SHUTDOWN_TIMEOUT) -> float:
    """Seconds that a launcher on this machine waits for an agent before it kills it."""
    return shutdown_timeout + LAUNCHER_AFTER_AGENT
