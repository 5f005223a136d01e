"""What TorchX's scheduler for Slurm lacks.

It knows of jobs from Slurm's accounting alone, without which every command ends in a traceback,
``torchx run`` after it has submitted; it starts failed jobs again whatever they failed of; all jobs
would meet at the same port; and since Slurm 22.05 each node's agent would have one core.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.history import ledger
from launch.ports import port_of_run

if TYPE_CHECKING:
    from torchx.specs import AppDef

# Accounting that is not there, or speaks another version's language.
_NO_ACCOUNTING = (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError)
_AFTER_SRUN = "exitcode=$?\n"
# The rest of TorchX's script would start any job again, and count preemptions as failures.
_RULE = """\
[ $exitcode -eq 0 ] || {python} -m launch.requeue $exitcode --most $TORCHX_MAX_RETRIES
TORCHX_MAX_RETRIES=0
"""


class OnSlurm:
    """Goes before TorchX's SlurmScheduler, see ``launch.schedulers``."""

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Gives the nodes of an app a port, its agents their cores, and its end a judgement."""
        ours = ledger.is_ours(app)
        for role in app.roles if ours else ():
            if role.num_replicas > 1 and "--rdzv-port" not in role.args:
                role.env.setdefault("PET_RDZV_PORT", str(port_of_run(role.env["ISORUN_RUN_ID"])))
        info = super().submit_dryrun(app, cfg)  # type: ignore[misc]
        if ours:
            for replica in info.request.replicas.values():
                cores = replica.sbatch_opts.get("cpus-per-task")
                replica.srun_opts.update({"cpus-per-task": cores} if cores else {})
                # Agents end each other, with the code of the rank that failed first.
                replica.srun_opts.update({"kill-on-bad-exit": "0", "wait": "0"})
            kind = type(info.request)
            info.request.__class__ = type(f"Judged{kind.__name__}", (_Judged, kind), {})
        return info

    def describe(self, app_id: str) -> Any:
        """The state of a job: what Slurm itself knows, and of older ones what its accounting does,
        where there is one. None: nobody knows the job."""
        from torchx.schedulers.api import DescribeAppResponse
        from torchx.specs import ReplicaStatus, Role, RoleStatus

        jobs = list(_jobs(app_id))
        if not jobs:
            with suppress(*_NO_ACCOUNTING):
                return super().describe(app_id)  # type: ignore[misc]
            return None
        statuses: dict[str, RoleStatus] = {}
        for job in jobs:
            role, _, number = job.name.rpartition("-")
            if role and number.isdigit():
                status = statuses.setdefault(role, RoleStatus(role, []))
                status.replicas.append(
                    ReplicaStatus(int(number), role=role, state=_state(job.state), hostname="")
                )
        return DescribeAppResponse(
            app_id=app_id,
            roles=[
                Role(name=name, image="", num_replicas=len(status.replicas))
                for name, status in statuses.items()
            ],
            roles_statuses=list(statuses.values()),
            state=_state(jobs[0].state),
            msg=jobs[0].state,
        )

    def list(self, *cfg: Any) -> Any:
        """All jobs of the accounting, else those that Slurm itself still knows of this user."""
        from torchx.schedulers.api import ListAppResponse

        with suppress(*_NO_ACCOUNTING):
            return super().list(*cfg)  # type: ignore[misc]
        lines = _ask("squeue", "--me", "--states=all", "--noheader", "--format=%i %T").splitlines()
        jobs = [line.replace("+0 ", " ").split() for line in lines]
        return [ListAppResponse(app_id=i, state=_state(s)) for i, s in jobs if i.isdigit()]

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """Of a job that has ended, as a shell has it: one, the highest of all its nodes."""
        codes = [job.exit_code for job in _jobs(app_id)]
        return [max(codes)] if codes else []


class _Judged:
    """Goes before TorchX's request: its script asks for another start only where that may help."""

    max_retries: int

    def materialize(self) -> str:
        script: str = super().materialize()  # type: ignore[misc]
        # Jobs run with what is installed here, though it may not be what the shell finds.
        rule = _RULE.format(python=shlex.quote(sys.executable))
        if not self.max_retries:
            return script
        return script.replace(_AFTER_SRUN, _AFTER_SRUN + rule, 1)


@dataclass(frozen=True)
class _Job:
    name: str
    state: str
    exit_code: int


def _jobs(app_id: str) -> Iterator[_Job]:
    """A job, or the parts of one with several nodes, the first of which runs its script."""
    for line in _ask("scontrol", "--oneliner", "show", "job", app_id).splitlines():
        found = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" in found:
            code, _, number = found["ExitCode"].partition(":")
            signal = int(number or 0)
            yield _Job(found["JobName"], found["JobState"], 128 + signal if signal else int(code))


def _state(name: str) -> Any:
    from torchx.schedulers.slurm_scheduler import SLURM_STATES
    from torchx.specs import AppState

    more = {"COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}
    return {**SLURM_STATES, **more}.get(name, AppState.UNKNOWN)


def _ask(*command: str) -> str:
    """What one of Slurm's commands says; nothing if it cannot be asked, or knows nothing."""
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""
