"""The text that names an artifact of W&B: ``wandb:[ENTITY/][PROJECT/]NAME[:ALIAS]``."""

from __future__ import annotations

import os
import re

from train.exits import UsageError

PREFIX = "wandb:"
PROJECT = "isorun"
"""The project of a run that sets none."""
_FORM = f"{PREFIX}ENTITY/PROJECT/NAME:ALIAS"
_PART = re.compile(r"[\w.\- ]{1,128}")
_ALIAS = re.compile(r"[^/:\s\x00-\x1f\x7f]{1,128}")


def is_artifact(text: str) -> bool:
    """Whether a place is an artifact of W&B."""
    return text.startswith(PREFIX)


def parse_name(text: str, where: str, *, project: str, entity: str | None = None) -> str:
    """The path of an artifact as W&B's client takes it: ``[entity/]project/name:alias``.

    A text without a project gets ``project``, or WANDB_PROJECT where that is set; one without
    an entity gets ``entity``, else W&B's own default. Without an alias it is ``latest``. ``where``
    begins messages: field and value. Raises UsageError for a text of another form.
    """
    path, colon, alias = text.removeprefix(PREFIX).partition(":")
    parts = path.split("/")
    is_name = 1 <= len(parts) <= 3 and all(_PART.fullmatch(part) for part in parts)
    if not is_name or set(parts) & {".", ".."} or (colon and not _ALIAS.fullmatch(alias)):
        raise UsageError(
            f"{where}, which does not name an artifact of W&B; write {_FORM}, where ENTITY, "
            "PROJECT and ALIAS may be left out."
        )
    if len(parts) == 1:
        parts.insert(0, os.environ.get("WANDB_PROJECT") or project)
    # The entity of a registry is an organisation, which W&B finds by itself.
    if len(parts) == 2 and entity and not parts[0].startswith("wandb-registry-"):
        parts.insert(0, entity)
    return f"{'/'.join(parts)}:{alias or 'latest'}"
