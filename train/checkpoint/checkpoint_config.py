"""The config section ``checkpoint``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from train.secrets import secret_option
from train.section import Section


class BestConfig(Section):
    """Keeps the best checkpoints by an evaluation metric."""

    metric: str = "loss"
    """Name of the evaluation metric."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    keep: int = Field(1, ge=1)
    """Number of best checkpoints to keep."""


class MirrorConfig(Section):
    """A copy of all committed checkpoints, from which an empty run directory is restored."""

    url: str
    """A URL that fsspec supports: s3://bucket/folder, gs://..., file:///... Each run needs its own.
    Credentials come from the environment, as for the storage's own tools."""

    options: dict[str, Any] = {}
    """Further arguments of the fsspec file system, such as endpoint_url. No secrets."""

    part_mb: int = Field(64, ge=1)
    """Part size of uploads in MiB; an interrupted upload resumes at the first missing part."""

    wait: float = Field(600.0, ge=0.0)
    """Seconds that the end of the run waits for pending uploads; a requested stop waits no longer
    than its deadline."""

    @field_validator("url")
    @classmethod
    def _names_place(cls, url: str) -> str:
        if not url.partition("://")[2].strip("/") and (not url or "://" in url):
            raise ValueError("the URL of a folder, such as s3://bucket/folder or file:///folder")
        return url

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        if name := secret_option(options):
            raise ValueError(
                f"without {name!r}, because the config is stored and logged; set secrets in the "
                "environment"
            )
        return options


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept.

    The end of the run and a requested stop always write one.
    """

    every_steps: int | None = Field(None, ge=1)
    """Write a checkpoint when the step is a multiple of this; null for no rule by steps."""

    every_minutes: float | None = Field(10.0, gt=0.0)
    """Write a checkpoint when this many minutes have passed since the last one; null for no rule by
    time."""

    asynchronous: bool = True
    """Write in a background thread; training stalls only for the copy to host memory."""

    on_error: Literal["warn", "stop"] = "warn"
    """On a failed write: warn and retry at the next checkpoint, or end the run (exit code 75)."""

    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""

    keep_every_steps: int | None = Field(None, ge=1)
    """Never remove checkpoints whose step is a multiple of this; null for none."""

    mirror: MirrorConfig | None = None
    """Where to copy committed checkpoints; null for nowhere."""

    restore_from: str | None = Field(None, pattern=r"^wandb:")
    """An artifact of W&B with a checkpoint of this run, wandb:ENTITY/PROJECT/NAME:ALIAS, from which
    a run directory without a checkpoint is restored, as the same run; null for none. It is an error
    if there is no such artifact."""

    keep_best: BestConfig | None = None
    """Also keep the best by an evaluation metric; null for none. Only checkpoints of steps that
    were evaluated can be best."""
