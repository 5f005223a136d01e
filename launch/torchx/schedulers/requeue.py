"""Requeues a failed Slurm job if another start may succeed.

Batch files run ``python -m launch.requeue CODE --most N`` on the first node of the job, with the
exit code of the agents; it exits with 0 if the job was requeued. Slurm's restart count includes
restarts after preemption and time limits, which are not failures and may happen every day. So
failures are counted in a file in the job's working directory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.contract import (
    Exit,
    Parser,
    RetryError,
    UsageError,
    exit_code_of,
    is_worth_retrying,
    log,
    whole_number,
)


def main() -> int:
    """Returns 0 if the job was requeued, else another exit code."""
    return exit_code_of(_requeue)


def _requeue() -> int:
    parser = Parser(
        prog="python -m launch.requeue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("code", type=int, help="exit code of the job's agents")
    parser.add_argument(
        "--most", type=int, required=True, metavar="N", help="maximum number of failures"
    )
    arguments = parser.parse_args()
    code, job = arguments.code, os.environ.get("SLURM_JOB_ID")
    if not job:
        raise UsageError(
            "SLURM_JOB_ID is not set (environment), so there is no job to requeue; use this "
            "command in a batch file of Slurm."
        )
    if not is_worth_retrying(code):
        return 1
    if _is_disabled(job):
        log(
            f"exit code {code}; the job was submitted with --no-requeue, so it is not requeued. "
            "Submit the same command again: the run resumes from the last checkpoint."
        )
        return 1
    # Preempted ranks have saved a checkpoint; that is not a failure.
    if code != Exit.PREEMPTED and (failures := _count(job, code)) > arguments.most:
        log(
            f"exit code {code}; this is failure {failures} of this job and the limit is "
            f"{arguments.most}, so it is not requeued."
        )
        return 1
    # Before the request: Slurm ends the batch script, and this process with it.
    log(f"exit code {code}; the job is requeued and resumes from the last checkpoint.")
    done = _scontrol("requeue", job)
    if done.returncode:
        raise RetryError(
            f"Slurm refuses to requeue job {job} ({done.stderr.strip() or 'no reason given'}). "
            "Submit the same command again: the run resumes from the last checkpoint."
        )
    return 0


def _is_disabled(job: str) -> bool:
    """Whether Slurm refuses to requeue a job: ``--no-requeue``, or the cluster's default."""
    shown = _scontrol("--oneliner", "show", "job", job).stdout
    return "Requeue=0" in shown.split()


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RetryError(
            f"scontrol cannot be started ({error.strerror}), so the job is not requeued. Check "
            "PATH on this node, then submit the job again."
        ) from None


def _count(job: str, code: int) -> int:
    """Records this failure, and returns the number of failures so far."""
    starts = whole_number(os.environ.get("SLURM_RESTART_COUNT", "")) or 0
    file = Path(f"isorun-{job}.failures")
    nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
    try:
        # On the first start a new file: Slurm may have used the job's number before.
        with file.open("a" if starts else "w", encoding="utf-8") as lines:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), f"exit code {code} on {nodes}", file=lines)
        return len(file.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        log(f"{file} cannot be written ({error.strerror}), so every start counts as a failure.")
        return starts + 1


if __name__ == "__main__":
    sys.exit(main())
