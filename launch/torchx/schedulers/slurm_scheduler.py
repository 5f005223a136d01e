"""TorchX's scheduler for Slurm, with the corrections that isorun's jobs need.

TorchX's own knows jobs only through Slurm's accounting: without it every command ends in a
traceback, ``torchx run`` after the submission. It requeues failed jobs after any exit code, gives
all jobs the same rendezvous port, and, since Slurm 22.05, gives each node's agent a single core.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchx.schedulers import slurm_scheduler as theirs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse
from torchx.schedulers.slurm_scheduler import create_scheduler
from torchx.specs import AppState, ReplicaStatus, Role, RoleStatus

from launch.agent_command import variable
from launch.contract import RUN_ID, UsageError, new_secret, python_module
from launch.history import launch_log
from launch.ports import port_of_run
from launch.torchx.refusals import command_refusal, program_refusal
from launch.torchx.schedulers.slurm_environment import for_submission
from launch.torchx.schedulers.watched import Recorded

if TYPE_CHECKING:
    from torchx.specs import AppDef

__all__ = ["RequeueingSlurmScheduler", "create_scheduler"]

# What TorchX raises if there is no accounting, or if its output has an unknown format.
_NO_ACCOUNTING = (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError)
_ADVICE = "correct -j, the resources (-h, --cpu, --memMB, --gpu), -cfg or SLURM_CONF"
_UNBUFFERED = "export SLURM_UNBUFFEREDIO=1\n"
_AFTER_SRUN = "exitcode=$?\n"
# TorchX's script goes on to requeue after any exit code, and counts preemptions as failures; with
# TORCHX_MAX_RETRIES=0 it does not requeue.
_REQUEUE = """\
[ $exitcode -eq 0 ] || {requeue} $exitcode --most $TORCHX_MAX_RETRIES
TORCHX_MAX_RETRIES=0
"""


class RequeueingRequest(theirs.SlurmBatchRequest):  # type: ignore[misc]
    """A batch job that is requeued only after retryable exit codes."""

    @classmethod
    def of(cls, request: Any) -> RequeueingRequest:
        """With the fields of TorchX's request."""
        return cls(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)})

    def materialize(self) -> str:
        """The batch script."""
        # With this variable srun gives tasks a terminal, and the log has escape sequences.
        script: str = super().materialize().replace(_UNBUFFERED, "")
        if not self.max_retries:
            return script
        # Jobs use this Python, which need not be the first in PATH.
        command = _REQUEUE.format(requeue=shlex.join(python_module("launch.requeue")))
        return script.replace(_AFTER_SRUN, _AFTER_SRUN + command, 1)


class RequeueingSlurmScheduler(Recorded, theirs.SlurmScheduler):  # type: ignore[misc]
    """See the module."""

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Adds the rendezvous port, the agents' cores and the requeue rule. Raises UsageError."""
        ours = launch_log.is_ours(app)
        for role in app.roles if ours else ():
            _refuse_commas(role.env)
            if role.num_replicas > 1 and "--rdzv-port" not in role.args:
                role.env.setdefault(variable("rdzv-port"), str(port_of_run(role.env[RUN_ID])))
        info = super().submit_dryrun(app, cfg)
        if ours:
            for replica in info.request.replicas.values():
                cores = replica.sbatch_opts.get("cpus-per-task")
                replica.srun_opts.update({"cpus-per-task": cores} if cores else {})
                # The agents stop each other, and exit with the code of the first failed rank.
                replica.srun_opts.update({"kill-on-bad-exit": "0", "wait": "0"})
            info.request = RequeueingRequest.of(info.request)
        return info

    def schedule(self, dryrun_info: Any) -> str:
        """Submits without the variables of an allocation's shell, and with a secret for several
        nodes. Raises UsageError or RetryError with sbatch's message, which TorchX does not read."""
        request = dryrun_info.request
        if (images := getattr(request, "images_to_push", None)) is not None:  # TorchX's nightly
            self.push_images(images)
        directory = request.job_dir
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
        options = {name for r in request.replicas.values() for name in r.sbatch_opts}
        with tempfile.TemporaryDirectory() as temporary:
            script = Path(directory or temporary, "torchx-sbatch.sh")
            script.write_text(request.materialize(), encoding="utf-8")
            chdir = [f"--chdir={directory}"] if directory else []
            words = [*request.cmd, *chdir, str(script)]
            environ = for_submission(os.environ, options)
            # sbatch passes its environment on to the job; only Slurm and the user can read it.
            given = [{**environ, **replica.env} for replica in request.replicas.values()]
            secret = new_secret(given[0]) if len(given) > 1 else {}
            job = _submit(words, {**environ, **secret})
        if directory:
            theirs._save_job_dir(job, directory)
        return job

    def describe(self, app_id: str) -> Any:
        """The state of a job: from scontrol, and for older jobs from the accounting, if there is
        one. None if the job is unknown."""
        jobs = list(_jobs(app_id))
        if not jobs:
            with suppress(*_NO_ACCOUNTING):
                return super().describe(app_id)
            return None
        statuses: dict[str, RoleStatus] = {}
        for job in jobs:
            role, _, number = job.name.rpartition("-")
            if role and number.isdecimal():
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
        """The jobs in the accounting; without accounting those that squeue lists."""
        with suppress(*_NO_ACCOUNTING):
            return super().list(*cfg)
        lines = _output(
            "squeue", "--me", "--states=all", "--noheader", "--format=%i %T"
        ).splitlines()
        jobs = [line.replace("+0 ", " ").split() for line in lines]
        return [ListAppResponse(app_id=i, state=_state(s)) for i, s in jobs if i.isdigit()]

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """The highest exit code of a job's nodes, as a shell reports it."""
        codes = [job.exit_code for job in _jobs(app_id)]
        return [max(codes)] if codes else []


@dataclass(frozen=True)
class _SlurmJob:
    name: str
    state: str
    exit_code: int


def _submit(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Runs sbatch; returns the number of the job. Raises UsageError or RetryError."""
    doing = "submit the job to slurm"
    try:
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    except OSError as error:
        raise program_refusal(error, words[0]).error(doing) from None
    if done.returncode:
        raise command_refusal(words[0], done.stderr, _ADVICE).error(doing)
    sys.stderr.write(done.stderr)  # warnings
    return done.stdout.strip().partition(";")[0]  # the name of a cluster may follow


def _jobs(app_id: str) -> Iterator[_SlurmJob]:
    """A job, or the components of a heterogeneous job; the first runs the batch script."""
    for line in _output("scontrol", "--oneliner", "show", "job", app_id).splitlines():
        found = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" in found:
            code, _, number = found["ExitCode"].partition(":")
            signal = int(number or 0)
            exit_code = 128 + signal if signal else int(code)
            yield _SlurmJob(found["JobName"], found["JobState"], exit_code)


def _state(name: str) -> AppState:
    more = {"COMPLETING": AppState.RUNNING, "CONFIGURING": AppState.PENDING}
    return {**theirs.SLURM_STATES, **more}.get(name, AppState.UNKNOWN)


def _output(*command: str) -> str:
    """The output of a Slurm command; empty if it is missing or fails."""
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


def _refuse_commas(env: Mapping[str, str]) -> None:
    """srun takes the environment as one list: text after a comma would be another variable."""
    for name, value in env.items():
        if "," in value:
            raise UsageError(
                f"{name} is {value!r} in the environment of the job, but Slurm cannot pass on a "
                f"value with a comma; remove it from --env and run `export {name}=...` before you "
                "submit: Slurm passes on the submitting shell's environment."
            )
