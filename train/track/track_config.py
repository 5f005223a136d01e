"""The config section ``track``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.artifacts.name import PROJECT
from train.plugins import Plugin
from train.section import Section


class TrackConfig(Section):
    """What is logged, and where. metrics.jsonl and the log files are always written."""

    log_every_steps: int = Field(10, ge=1)
    """Log metrics when the step is a multiple of this, and at the first and the last step."""

    console: Literal["auto", "bar", "plain", "quiet"] = "auto"
    """auto: a progress bar on a terminal, plain lines elsewhere."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

    histograms_every_steps: int | None = Field(None, ge=1)
    """Log histograms of weights and gradients when the step is a multiple of this; null for
    none."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if W&B has credentials, else offline."""

    wandb_project: str = PROJECT
    """W&B project."""

    wandb_entity: str | None = None
    """W&B entity; null for the user's default."""

    wandb_tags: list[str] = []
    """W&B tags."""

    wandb_group: str | None = None
    """W&B group; null for the run's id."""

    wandb_job_type: str | None = None
    """W&B job type, such as train or finetune."""

    wandb_notes: str | None = None
    """W&B notes: what the run is for."""

    wandb_alerts: bool = False
    """Send warnings, and starts after a failure, as alerts of W&B (mail or Slack)."""

    wandb_checkpoints: Literal["none", "reference", "best", "all"] = "none"
    """Committed checkpoints as artifacts of W&B. reference: where they are, without an upload, for
    shared storage and mirrors; best: upload the best and the final one; all: upload each."""

    code_diff_kb: int = Field(500, ge=0, le=100_000)
    """Record what the code differs in from its git commit, new source files included, in at most so
    many kB (1000 bytes) per attempt; 0 for nothing. Files with names of secrets are left out."""

    wandb_nodes: bool = False
    """Send the system metrics of all nodes to W&B, not only of the first one, by W&B's shared mode;
    only online."""

    sinks: list[Plugin] = []
    """Further places for metrics: classes derived from train.Sink, by dotted path."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of messages in the log files."""
