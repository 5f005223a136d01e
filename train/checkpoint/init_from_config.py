"""The config section ``init_from``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from train.section import Section, non_semantic


class InitFromConfig(Section):
    """Start from existing weights. A text alone stands for ``source``."""

    source: str = Field(min_length=1)
    """A run directory (its newest checkpoint), a checkpoint (RUN/checkpoints/step-N), an export or
    another directory with model.safetensors or model.safetensors.index.json, a .safetensors, .pt,
    .pth or .bin file, the URL of a mirror (s3://bucket/folder, file:///folder), or an artifact of
    W&B (wandb:ENTITY/PROJECT/NAME:ALIAS). Only parameters and persistent buffers are loaded, before
    the first step; a resume does not read it."""

    strict: bool = non_semantic(True)
    """Refuse a source whose names or shapes are not those of the model. false: load what matches in
    name and shape, and list the rest."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return {"source": value}
        if not isinstance(value, Mapping | InitFromConfig):
            raise ValueError("a place such as runs/base, or a mapping with source and strict")
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Either form, for editors."""
        section = super().__get_pydantic_json_schema__(core_schema, handler)
        return {"anyOf": [section, {"type": "string", "minLength": 1}]}
