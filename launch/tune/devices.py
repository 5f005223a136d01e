"""The share of this machine that each of several trials at a time gets."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

from launch.contract import UsageError, threads_per_process

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The identifiers of the GPUs that processes with this environment use; torch is not
    imported."""
    if _VISIBLE in environ:
        return [word.strip() for word in environ[_VISIBLE].split(",") if word.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(found))]


def shares(parallel: int, processes: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment variables of each of ``parallel`` places for trials of ``processes`` ranks.

    Each place has GPUs of its own, or an equal part of the cores. Raises UsageError for too few
    GPUs.
    """
    threads = str(threads_per_process(parallel * processes))
    variables = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": threads}
    gpus = visible_gpus(environ)
    if not gpus:
        return [dict(variables) for _ in range(parallel)]
    size = len(gpus) // parallel
    if size < processes:
        raise UsageError(
            f"--parallel {parallel} with --processes {processes} needs {parallel * processes} "
            f"GPUs, but {len(gpus)} are visible here; lower one of them."
        )
    if parallel == 1:
        return [dict(variables)]
    return [
        {**variables, _VISIBLE: ",".join(gpus[place * size : (place + 1) * size])}
        for place in range(parallel)
    ]
