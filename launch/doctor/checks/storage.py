"""The run directory on one node: may be written to, has room, and how fast it is."""

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
from launch.doctor.findings import Finding, broken, misset, ok, skipped, warning
from launch.doctor.guard import attempt
from launch.doctor.place import Place

_MIB = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES, PROBE_SECONDS = 256 * _MIB, 3.0
ESTIMATE_SECONDS = 30.0
SLOW = 50 * _MIB  # bytes per second: a local disk from before flash
# Tensors of a parameter's size in the optimiser's state; two where it is not known.
_STATES = {
    "adamw": 2, "adam": 2, "nadam": 2, "radam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1,
    "adafactor": 0,
}  # fmt: skip


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def writable(loaded: LoadedConfig) -> list[Finding]:
    """Whether a file can be written, durably, where the run directory is or will be."""
    check, directory = "run directory", loaded.run_directory.absolute()
    where = existing(directory)
    told = f"run.dir is {str(directory)!r} ({loaded.composed.where('run.dir')})"
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=".isorun-") as file:
            file.write(os.urandom(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{told}, but nothing can be written to {where}: {error.strerror}"
        if error.errno in _FULL:
            return [broken(check, text, "make room, then start it again")]
        return [misset(check, text, "choose another run.dir, or give this user leave to write")]
    if os.statvfs(where).f_favail == 0 and os.statvfs(where).f_files:
        return [broken(check, f"{where} has no inodes left", "remove files, then start it again")]
    return [ok(check, f"{directory} can be written to")]


def model_bytes(loaded: LoadedConfig) -> int:
    """Bytes of a checkpoint: fp32 parameters, the optimiser's state, and an average of weights.
    Builds the task's model without memory."""
    import torch

    config = loaded.config
    with torch.device("meta"):
        model = loaded.task(config).build_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    states = _STATES.get(config.optim.use, 2) + (config.optim.momentum is not None)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return 4 * count * (1 + states + (config.ema is not None)) + buffers


def room(place: Place, estimate: Callable[[LoadedConfig], int] = model_bytes) -> list[Finding]:
    """Whether there is room for the checkpoints that the run keeps, and the one being written."""
    assert place.loaded is not None
    check, loaded, keep = "free space", place.loaded, place.loaded.config.checkpoint
    directory = loaded.run_directory.absolute()
    free = shutil.disk_usage(existing(directory)).free
    store = CheckpointStore(directory / "checkpoints")
    steps = store.steps()
    if steps:
        files = [path for path in store.path(steps[-1]).rglob("*") if path.is_file()]
        size, source = sum(path.stat().st_size for path in files), "as the newest has"
    elif place.full:
        estimated, why = attempt(partial(estimate, loaded), ESTIMATE_SECONDS)
        if estimated is None:
            reason = f"the model cannot be built without memory ({why})"
            return [skipped(check, f"{readable(free)} are free; {reason}")]
        size, source = estimated, "by its parameters"
    else:
        reason = "there is no checkpoint yet, and only level full estimates its size"
        return [skipped(check, f"{readable(free)} are free; {reason}")]
    count = keep.keep_last + 1 + (keep.keep_best.keep if keep.keep_best else 0)
    more = max(1, count - len(steps))
    said = (
        f"{readable(free)} are free; {more} more checkpoint(s) of {readable(size)} ({source}) "
        f"need {readable(more * size)}"
    )
    values: dict[str, Any] = {"free_bytes": free, "checkpoint_bytes": size, "more": more}
    if free < more * size:
        advice = "make room, choose another run.dir, or set checkpoint.keep_last lower"
        return [broken(check, said, advice, **values)]
    return [ok(check, said, **values)]


def speed(loaded: LoadedConfig) -> list[Finding]:
    """How fast the run directory is written and read, measured with one file of at most
    ``PROBE_BYTES``, for at most ``PROBE_SECONDS`` each way."""
    check, where = "disk speed", existing(loaded.run_directory.absolute())
    most = min(PROBE_BYTES, shutil.disk_usage(where).free // 4)
    if most < _MIB:
        return [skipped(check, "there is too little free space to measure it")]
    block = os.urandom(4 * _MIB)  # which no file system compresses
    with tempfile.TemporaryDirectory(dir=where, prefix=".isorun-") as temporary:
        path = Path(temporary) / "probe"
        write, size = _write(path, block[:most], most)
        read = _read(path, len(block))
    said = f"{readable(write)}/s written, {readable(read)}/s read, with {readable(size)}"
    values: dict[str, Any] = {"write_bytes_per_second": write, "read_bytes_per_second": read}
    if write < SLOW:
        return [
            warning(
                check,
                said,
                "checkpoints take long; choose faster storage for run.dir, or write them less "
                "often (checkpoint.every_minutes)",
                **values,
            )
        ]
    return [ok(check, said, **values)]


def _write(path: Path, block: bytes, most: int) -> tuple[float, int]:
    """(bytes per second, bytes); durable ones."""
    started, size = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while size + len(block) <= most and time.perf_counter() - started < PROBE_SECONDS:
            size += file.write(block)
        os.fsync(file.fileno())
        rate = size / (time.perf_counter() - started)
        # Else the read below would be one from memory. (Advice: not every file system follows.)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return rate, size


def _read(path: Path, block: int) -> float:
    started, size = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while time.perf_counter() - started < PROBE_SECONDS and (chunk := file.read(block)):
            size += len(chunk)
    return size / (time.perf_counter() - started)
