"""How long a stop may take: ranks save, the agent reports, the launcher kills what is left.

All count from the same request to stop, so each needs more time than the one before it::

                               stop deadline   shutdown timeout   reports of     grace period
                               of the ranks    of the agent       other nodes    of the launcher
    agent's defaults           30 = 35 - 5     35                 40 = 35 + 5
    local_cwd, local_docker    30              35                 40             45 = 35 + 10
    docker/compose.yaml        30              35                 40             60
    k8s/base/job.yaml          90              105 = 90 + 15      110            120 = 105 + 15
    configs/slurm/fit.sbatch   105 = 110 - 5   110                115            120

At its timeout the agent kills ranks that still run, waits for the reports of other nodes, writes
the failure record and ends. In a batch file of Slurm the grace period is the time before the limit
of the job. The YAML and the batch file hold these numbers as text; tests compare them.

TorchX's other schedulers, and Slurm after a preemption or ``scancel``, have a grace period of their
own, often 30 s, which is too short for the defaults: there PET_SHUTDOWN_TIMEOUT=20 adds up.
"""

from __future__ import annotations

SHUTDOWN_TIMEOUT = 35.0
"""Default of the agent's ``--shutdown-timeout``: seconds until it kills ranks that still run."""

AGENT_AFTER_RANKS = 5.0
"""Seconds between the ranks' deadline and the agent's timeout, to end and to report."""

REPORTS_AFTER_AGENT = 5.0
"""Seconds after its timeout for which an agent that was asked to stop waits for other nodes."""

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


def reports_due(
    silent_since: float, usual: float, asked: float | None, shutdown_timeout: float
) -> float:
    """When a node counts as lost that was last heard from at ``silent_since``: after ``usual``
    seconds, or before the launcher kills this agent, if it was ``asked`` to stop."""
    due = silent_since + usual
    return due if asked is None else min(due, asked + shutdown_timeout + REPORTS_AFTER_AGENT)


def adds_up(stop_deadline: float, shutdown_timeout: float, grace_period: float) -> bool:
    """Whether ranks can save, and the agent can report, before the launcher kills them."""
    return stop_deadline < shutdown_timeout < grace_period - REPORTS_AFTER_AGENT
