"""When checkpoints are written, and which of them are kept."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from train.section import Section


class BestConfig(Section):
    """Keeps the best checkpoints by an evaluation metric."""

    metric: str = "loss"
    """Name of the evaluation metric."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    keep: int = Field(1, ge=1)
    """How many of the best are kept."""


class MirrorConfig(Section):
    """A second place for committed checkpoints, from which an empty run directory is restored."""

    url: str
    """Any address that fsspec knows: s3://bucket/folder, gs://..., file:///... Each run needs one
    of its own. Credentials come from the environment, as with the storage's own tools."""

    options: dict[str, Any] = {}
    """Further arguments of fsspec's file system, such as endpoint_url. No secrets."""

    part_mb: int = Field(64, ge=1)
    """Files are sent in parts of so many MiB; one that was interrupted goes on with the next."""

    wait: float = Field(600.0, ge=0.0)
    """Seconds that the end of the run waits for what is not sent yet. A run that was asked to
    stop waits no longer than its deadline."""

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if re.search("key|secret|token|password|credential", name, re.IGNORECASE):
                raise ValueError(
                    f"without {name!r}, since the config is kept and logged; put secrets into the "
                    "environment"
                )
        return options


class CheckpointConfig(Section):
    """When checkpoints are written, and which of them are kept.

    One is written at the end of the run and upon a request to stop in any case.
    """

    every_steps: int | None = Field(None, ge=1)
    """A checkpoint each time the step is a multiple of this; null for no such rule."""

    every_minutes: float | None = Field(10.0, gt=0.0)
    """A checkpoint when this much time has passed since the last one, so that a crash never costs
    more; null for no such rule."""

    asynchronous: bool = True
    """Write beside the training, which waits only for a copy of the state in host memory."""

    on_error: Literal["warn", "stop"] = "warn"
    """What a failed write means: go on, warn and try again next time, or end the run (75)."""

    keep_last: int = Field(2, ge=1)
    """How many of the newest are kept."""

    keep_every_steps: int | None = Field(None, ge=1)
    """Those whose step is a multiple of this are kept for ever; null for none."""

    mirror: MirrorConfig | None = None
    """Copies committed checkpoints to another place; null for none."""

    keep_best: BestConfig | None = None
    """Keeps the best by an evaluation metric besides; null for none. Only checkpoints at whose
    step an evaluation ran have one."""
