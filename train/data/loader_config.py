"""The config section ``loader``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train.section import Section


class LoaderConfig(Section):
    """How samples are loaded. None of this changes what is loaded."""

    workers: int = Field(0, ge=0)
    """Processes per rank that load beside the training; 0 loads within it."""

    prefetch_factor: int | None = Field(None, ge=1)
    """Micro-batches that each worker keeps ready; by default 2."""

    persistent_workers: bool = False
    """Keep evaluation's workers from one evaluation to the next. (Training's live throughout.)"""

    pin_memory: bool | Literal["auto"] = "auto"
    """Load into page-locked memory, which a GPU copies from faster; auto: if there is a GPU."""

    timeout: float = Field(0.0, ge=0.0)
    """Seconds to wait for a worker's micro-batch before the run ends with code 75; 0: for ever."""

    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers are started; null for the platform's default."""

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.workers == 0:
            for name in (
                "prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context"
            ):  # fmt: skip
                if getattr(self, name):
                    raise ValueError(
                        f"loader.{name} is {getattr(self, name)!r}, but loader.workers is 0, and "
                        "without workers it means nothing; set loader.workers or unset it"
                    )
        return self
