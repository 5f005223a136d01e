"""torch.profiler around some steps of a run or a trial."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from train.exits import first_line
from train.files import replacing
from train.profiling.files import trace_name
from train.profiling.profile_config import ProfileConfig

_log = logging.getLogger("train")
_PACK_SECONDS = 20.0
"""The longest wait for files that are still compressed when an attempt ends."""


def annotation(phase: str) -> AbstractContextManager[object]:
    """Marks in the trace what the main thread does: ``isorun.data``, ``isorun.wait``."""
    return record_function(f"isorun.{phase}")


class Recorder:
    """Records the steps that the config's schedule chooses, on one rank.

    ``folder`` returns the directory for the files; it is called when there is one to write.
    ``written`` gets the last step of a trace and its file, in a thread. Nothing here raises: after
    an error there is one warning, by ``warn``, and no more trace.
    """

    def __init__(
        self,
        config: ProfileConfig,
        rank: int,
        device: torch.device,
        *,
        folder: Callable[[], Path],
        written: Callable[[int, Path], None],
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._rank, self._device = config, rank, device
        self._folder, self._written, self._warn = folder, written, warn
        self._profile: Any = None
        self._left = config.repeat
        self._step = 0
        self._failing = False
        self._packing: list[threading.Thread] = []

    def start(self, step: int) -> None:
        """Called before the step after ``step``: the schedule counts from it."""
        self._step = step
        self._safely(self._start)

    def _start(self) -> None:
        # Otherwise kineto prints a line when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        # With a schedule this is meant; torch says it at the second trace.
        warnings.filterwarnings("ignore", ".*Profiler clears events at the end", UserWarning)
        config, first = self._config, self._step + 1
        action = schedule(
            wait=config.wait, warmup=config.warmup, active=config.active, repeat=config.repeat
        )
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        made = profile(
            activities=activities,
            schedule=lambda number: action(max(0, number - first)),
            on_trace_ready=self._ready,
            record_shapes=config.record_shapes,
            with_stack=config.with_stack,
            profile_memory=config.memory,
        )
        made.step_num = first  # the marker in the trace has the number of the step
        made.start()
        self._profile = made

    def step_end(self) -> None:
        """Called after each step, with all that the loop does after it."""
        if self._profile is not None:
            self._step += 1
            self._safely(self._profile.step)
            if not self._left:
                self._safely(self._stop)

    def _stop(self) -> None:
        stopping, self._profile = self._profile, None
        if stopping is not None:
            stopping.stop()

    def _ready(self, recorded: Any) -> None:
        self._left -= 1
        if self._failing:
            return
        folder = self._folder()
        number, raw = tempfile.mkstemp(prefix=".trace-", suffix=".json", dir=folder)
        os.close(number)
        try:
            recorded.export_chrome_trace(raw)
        except BaseException:
            Path(raw).unlink(missing_ok=True)
            raise
        path = folder / trace_name(self._rank, self._step)
        # Compression releases the interpreter's lock, so that the next steps do not wait for it.
        thread = threading.Thread(
            target=self._safely, args=(self._pack, Path(raw), path, self._step), daemon=True
        )
        thread.start()
        self._packing.append(thread)

    def _pack(self, raw: Path, path: Path, step: int) -> None:
        try:
            with (
                raw.open("rb") as source,
                replacing(path) as file,
                gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=5) as packed,
            ):
                shutil.copyfileobj(source, packed, 1 << 20)
        finally:
            with suppress(OSError):
                raw.unlink()
        self._written(step, path)

    def close(self, *, failing: bool = False) -> None:
        """Writes the trace of the steps so far, if one is being recorded; not where an error ends
        the run (``failing``). Waits some seconds for files that are being compressed."""
        self._failing = failing
        self._safely(self._stop)
        for thread in self._packing:
            thread.join(_PACK_SECONDS)
        self._packing.clear()

    def _safely(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._profile = None
            _log.info("profiling failed", exc_info=True)
            self._warn(
                f"Profiling failed ({type(error).__name__}: {first_line(error)}); there is "
                "no trace of these steps."
            )
