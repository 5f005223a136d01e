"""The profiler of a run: traces of some of its steps, and a snapshot when memory runs out."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch

from train.checkpoint.run_directory import RunDirectory
from train.exits import OutOfMemoryError, first_line
from train.process.diagnose import is_out_of_memory
from train.profiling.files import make_folder, snapshot_name
from train.profiling.memory_history import start_history, write_snapshot
from train.profiling.profile_config import ProfileConfig
from train.profiling.recorder import Recorder, annotation
from train.setup.join import Joined
from train.track.tracker import Tracker

_log = logging.getLogger("train")


def start_memory_history(device: torch.device) -> None:
    """Records allocations on a GPU from now on; warns where that fails."""
    try:
        start_history(device)
    except Exception as error:  # an interface of torch that is not stable
        _log.warning("The history of allocations cannot be recorded (%s).", first_line(error))


def open_recorder(
    stack: ExitStack,
    config: ProfileConfig,
    directory: RunDirectory,
    joined: Joined,
    tracker: Tracker,
) -> Recorder | None:
    """The recorder of this rank, which closes with ``stack``; None where it records nothing."""
    engine, attempt = joined.engine, joined.attempt.number
    missing = [rank for rank in config.ranks if rank >= engine.world_size]
    if missing and engine.is_main:
        tracker.warn(
            f"profile.ranks names {', '.join(map(str, missing))}, but there are only the ranks 0 "
            f"to {engine.world_size - 1}."
        )
    _write_snapshot_at_failure(stack, config, directory, joined, tracker)
    if engine.rank not in config.ranks:
        return None

    recorder = Recorder(
        config,
        engine.rank,
        engine.device,
        folder=lambda: make_folder(directory.path, attempt),
        written=tracker.trace,
        warn=tracker.warn,
    )
    joined.goodput.clock.annotate = annotation

    def leave(kind: object, error: BaseException | None, trace: object) -> None:
        joined.goodput.clock.annotate = None
        recorder.close(failing=error is not None)

    stack.push(leave)
    return recorder


def _write_snapshot_at_failure(
    stack: ExitStack,
    config: ProfileConfig,
    directory: RunDirectory,
    joined: Joined,
    tracker: Tracker,
) -> None:
    if not config.memory or joined.engine.device.type != "cuda":
        return

    def leave(kind: object, error: BaseException | None, trace: object) -> None:
        if not (isinstance(error, OutOfMemoryError) or (error and is_out_of_memory(error))):
            return
        try:
            folder = make_folder(directory.path, joined.attempt.number)
            path = folder / snapshot_name(joined.engine.rank)
            write_snapshot(path)
        except Exception as failed:
            tracker.warn(f"The memory snapshot cannot be written ({first_line(failed)}).")
        else:
            tracker.warn(f"Memory snapshot: {path} (open it in https://pytorch.org/memory_viz).")

    stack.push(leave)
