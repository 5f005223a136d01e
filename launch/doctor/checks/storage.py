"""The run directory on one node: whether it can be written, its free space and its speed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch.contract import CheckpointStore, LoadedConfig
from launch.doctor.checks.units import readable
from launch.doctor.findings import (
    Finding,
    infrastructure_failure,
    misconfigured,
    ok,
    skipped,
    warning,
)
from launch.doctor.guard import attempt
from launch.doctor.place import Place

_MIB = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES, PROBE_SECONDS = 256 * _MIB, 3.0
ESTIMATE_SECONDS = 30.0
SLOW = 50 * _MIB  # bytes per second; a hard disk is faster
# Tensors of a parameter's size in the optimiser's state; two if it is not known.
_STATES = {
    "adamw": 2, "adam": 2, "nadam": 2, "radam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1,
    "adafactor": 0,
}  # fmt: skip


def existing(directory: Path) -> Path:
    """The directory, or its nearest parent that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def writable(loaded: LoadedConfig) -> list[Finding]:
    """Whether a file can be written and synced where the run directory is or will be."""
    check, directory = "run directory", loaded.run_directory.absolute()
    where = existing(directory)
    setting = f"run.dir is {str(directory)!r} ({loaded.composed.where('run.dir')})"
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=".isorun-") as file:
            file.write(os.urandom(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{setting}, but {where} cannot be written: {error.strerror}"
        if error.errno in _FULL:
            return [infrastructure_failure(check, text, "free space, then rerun")]
        return [
            misconfigured(check, text, "choose another run.dir, or give this user write permission")
        ]
    if os.statvfs(where).f_favail == 0 and os.statvfs(where).f_files:
        return [
            infrastructure_failure(check, f"{where} has no inodes left", "remove files, then rerun")
        ]
    return [ok(check, f"{directory} can be written")]


def model_bytes(loaded: LoadedConfig) -> int:
    """Bytes of a checkpoint: fp32 parameters, the optimiser's state, and averaged weights. Builds
    the task's model on torch's meta device."""
    import torch

    config = loaded.config
    with torch.device("meta"):
        model = loaded.task(config).build_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    states = _STATES.get(config.optim.use, 2) + (config.optim.momentum is not None)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return 4 * count * (1 + states + (config.ema is not None)) + buffers


def room(place: Place, estimate: Callable[[LoadedConfig], int] = model_bytes) -> list[Finding]:
    """Whether there is space for the checkpoints that the run keeps, and the one being written."""
    assert place.loaded is not None
    check, loaded, keep = "free space", place.loaded, place.loaded.config.checkpoint
    directory = loaded.run_directory.absolute()
    free = shutil.disk_usage(existing(directory)).free
    store = CheckpointStore(directory / "checkpoints")
    steps = store.steps()
    if steps:
        files = [path for path in store.path(steps[-1]).rglob("*") if path.is_file()]
        size, source = sum(path.stat().st_size for path in files), "size of the newest"
    elif place.full:
        estimated, why = attempt(partial(estimate, loaded), ESTIMATE_SECONDS)
        if estimated is None:
            reason = f"the model cannot be built on the meta device ({why})"
            return [skipped(check, f"{readable(free)} are free; {reason}")]
        size, source = estimated, "computed from its parameters"
    else:
        reason = "there is no checkpoint yet, and only level full computes its size"
        return [skipped(check, f"{readable(free)} are free; {reason}")]
    count = keep.keep_last + 1 + (keep.keep_best.keep if keep.keep_best else 0)
    more = max(1, count - len(steps))
    summary = (
        f"{readable(free)} are free; {more} more checkpoint(s) of {readable(size)} ({source}) "
        f"need {readable(more * size)}"
    )
    values: dict[str, Any] = {"free_bytes": free, "checkpoint_bytes": size, "more": more}
    if free < more * size:
        advice = "free space, choose another run.dir, or set checkpoint.keep_last lower"
        return [infrastructure_failure(check, summary, advice, **values)]
    return [ok(check, summary, **values)]


def speed(loaded: LoadedConfig) -> list[Finding]:
    """Write and read speed of the run directory, measured with one file of at most
    ``PROBE_BYTES``, for at most ``PROBE_SECONDS`` each."""
    check, where = "disk speed", existing(loaded.run_directory.absolute())
    most = min(PROBE_BYTES, shutil.disk_usage(where).free // 4)
    if most < _MIB:
        return [skipped(check, "too little free space for a measurement")]
    block = os.urandom(4 * _MIB)  # random, so that no file system compresses it
    with tempfile.TemporaryDirectory(dir=where, prefix=".isorun-") as temporary:
        path = Path(temporary) / "probe"
        write, size = _write(path, block[:most], most)
        read = _read(path, len(block))
    summary = f"{readable(write)}/s written, {readable(read)}/s read, with {readable(size)}"
    values: dict[str, Any] = {"write_bytes_per_second": write, "read_bytes_per_second": read}
    if write < SLOW:
        return [
            warning(
                check,
                summary,
                "checkpoints take long: choose faster storage for run.dir, or write them less "
                "often (checkpoint.every_minutes)",
                **values,
            )
        ]
    return [ok(check, summary, **values)]


def _write(path: Path, block: bytes, most: int) -> tuple[float, int]:
    """(bytes per second, bytes) of a synced file."""
    started, size = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while size + len(block) <= most and time.perf_counter() - started < PROBE_SECONDS:
            size += file.write(block)
        os.fsync(file.fileno())
        rate = size / (time.perf_counter() - started)
        # Otherwise the file is read from memory. (Not every file system follows the advice.)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return rate, size


def _read(path: Path, block: int) -> float:
    started, size = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while time.perf_counter() - started < PROBE_SECONDS and (chunk := file.read(block)):
            size += len(chunk)
    return size / (time.perf_counter() - started)
