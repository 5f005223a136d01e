"""The config section ``init_from``."""

from __future__ import annotations

from pydantic import Field

from train.section import ShortSection, non_semantic


class InitFromConfig(ShortSection):
    """Start from existing weights. A text alone stands for ``source``."""

    short_field = "source"
    short_form = "a place such as runs/base"

    source: str = Field(min_length=1)
    """A run directory (its newest checkpoint), a checkpoint (RUN/checkpoints/step-N), an export or
    another directory with model.safetensors or model.safetensors.index.json, a .safetensors, .pt,
    .pth or .bin file, the URL of a mirror (s3://bucket/folder, file:///folder), or an artifact of
    W&B (wandb:ENTITY/PROJECT/NAME:ALIAS). Only parameters and persistent buffers are loaded, before
    the first step; a resume does not read it."""

    strict: bool = non_semantic(True)
    """Refuse a source whose names or shapes are not those of the model. false: load what matches in
    name and shape, and list the rest."""
