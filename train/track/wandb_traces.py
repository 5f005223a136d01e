"""The traces of torch.profiler as files of the W&B run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from train.exits import first_line
from train.profiling.files import PROFILE, NewTraces, place_copy
from train.track.sinks import RunInfo

LIMIT = 200 << 20
"""The largest trace, in bytes, that is sent."""
_log = logging.getLogger("train")


class RunTraces:
    """Sends the traces of an attempt, each once, as ``profile/attempt-K/...`` among the files of
    the W&B run. W&B's own process uploads them; offline, they are uploaded with the rest."""

    def __init__(self, run: RunInfo) -> None:
        self._new = NewTraces(run.directory, run.attempt)

    def send(self, wandb_run: Any) -> None:
        """Sends those since the last call. A failure is a warning."""
        try:
            for trace in self._new.take():
                size = trace.path.stat().st_size
                if size > LIMIT:
                    _log.warning(
                        "%s has %d MiB, more than the %d MiB of a trace that W&B gets; it stays in "
                        "the run directory.", trace.path, size >> 20, LIMIT >> 20,
                    )  # fmt: skip
                    continue
                folder = Path(wandb_run.dir) / PROFILE / f"attempt-{trace.attempt}"
                folder.mkdir(parents=True, exist_ok=True)  # W&B links files elsewhere
                place_copy(trace.path, folder / trace.path.name)
                wandb_run.save(folder / trace.path.name, base_path=wandb_run.dir, policy="now")
        except Exception as error:
            _log.warning("A trace cannot be sent to W&B (%s).", first_line(error))
