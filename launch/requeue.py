"""Puts a Slurm job that failed back into the queue, where another start may help.

Batch files call ``python -m launch.requeue CODE --most N`` on the job's first node with the exit
code of its agents; it ends with 0 if the job was put back. Slurm's own count of starts includes
those after preemption and time limits, which are no failures and may come every day; so failures
of machines are counted here, in a file of the directory that the job runs in.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.contract import Exit, is_worth_retrying


def main() -> int:
    """0: it was put back; 1: it was not."""
    parser = argparse.ArgumentParser(prog="python -m launch.requeue", description=__doc__)
    parser.add_argument("code", type=int, help="the exit code of the job's agents")
    parser.add_argument(
        "--most", type=int, required=True, metavar="N", help="failures of machines that it may have"
    )
    arguments = parser.parse_args()
    code, job = arguments.code, os.environ["SLURM_JOB_ID"]
    if not is_worth_retrying(code):
        return 1
    # 143: stopped on request, with a checkpoint.
    if code != Exit.PREEMPTED and (failures := _count(job, code)) > arguments.most:
        _tell(f"exit code {code}; that was failure {failures}, and {arguments.most} are allowed.")
        return 1
    _tell(f"exit code {code}; back into the queue, to go on from the last checkpoint.")
    return int(subprocess.run(["scontrol", "requeue", job], check=False).returncode != 0)


def _count(job: str, code: int) -> int:
    """Writes this failure down, and says how many there are."""
    starts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    file = Path(f"isorun-{job}.failures")
    nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
    try:
        # Slurm may have given the number to another job long ago.
        with file.open("a" if starts else "w", encoding="utf-8") as log:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), f"exit code {code} on {nodes}", file=log)
        return len(file.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        _tell(f"{file} cannot be written ({error.strerror}), so each start counts as a failure.")
        return starts + 1


def _tell(text: str) -> None:
    print(f"isorun: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
