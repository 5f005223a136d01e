"""The config section ``loader``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train.section import Section


class LoaderConfig(Section):
    """How samples are loaded. No field changes which samples are loaded or in which order."""

    workers: int = Field(0, ge=0)
    """Worker processes per rank; 0 loads in the training process."""

    prefetch_factor: int | None = Field(None, ge=1)
    """Micro-batches that each worker prefetches; null for 2."""

    persistent_workers: bool = False
    """Keep the workers of an evaluation for the next one. (Training's workers always persist.)"""

    pin_memory: bool | Literal["auto"] = "auto"
    """Load into pinned memory, for faster copies to a GPU; auto: if the device is a GPU."""

    timeout: float = Field(0.0, ge=0.0)
    """Seconds to wait for a worker's micro-batch before the run ends with 75; 0: no limit."""

    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """Start method of the workers; null for the platform's default."""

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.workers == 0:
            for name in (
                "prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context"
            ):  # fmt: skip
                if getattr(self, name):
                    raise ValueError(
                        f"loader.{name} is {getattr(self, name)!r}, which has no effect because "
                        f"loader.workers is 0; set loader.workers, or unset loader.{name}"
                    )
        return self
