"""Whose configs may name code.

To import a dotted path such as ``my_project.task:MyTask`` runs its module, so neither an export nor
the config of another user's run chooses one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.config.compose import Composed
from train.config.no_secrets import leaves
from train.exits import UsageError
from train.imports import is_dotted_path
from train.tasks.registry import BUILT_IN

TASK_SECTIONS = ("task", "model", "data")
"""What the commands read that load a model without training it, besides ``strategy``."""


def dotted_paths(values: Any) -> Iterator[tuple[str, str]]:
    """Key and value of each text that has the form of a dotted path, except built-in tasks."""
    for place, value in leaves(values):
        key = re.sub(r"\[\d+\]", "", place)  # a list is set as a whole
        is_built_in = key == "task.use" and value in BUILT_IN.values()
        if isinstance(value, str) and is_dotted_path(value) and not is_built_in:
            yield key, value


def refuse_code_of_others(
    composed: Composed, run_configs: Sequence[Path], sections: Sequence[str] | None
) -> None:
    """Raises UsageError if a dotted path comes from another user's run.

    ``run_configs``: each the config.json of a run directory. ``sections``: those that are used;
    None for all.
    """
    others = {str(path): owner for path in run_configs if (owner := _other_owner(path))}
    if not others:
        return
    for key, value in dotted_paths(composed.values):
        # The origin of an interpolated value names a variable, and then the file.
        origin = composed.origin(key)
        file = next((file for file in others if file in origin), None)
        if file and (sections is None or key.partition(".")[0] in sections):
            raise UsageError(
                f"{key} is {value!r} in {file}, which {others[file]}, and importing it runs code; "
                f"if you trust it, set it yourself: add {key}={value} to the command."
            )


def _other_owner(path: Path) -> str:
    """Why the config of a run directory may be another user's; empty if it is this user's or
    root's."""
    trusted = {os.geteuid(), 0}
    for each in (path, path.parent):
        status = each.stat()
        if status.st_uid not in trusted:
            return f"belongs to another user (uid {status.st_uid})"
    return "everyone may change" if path.stat().st_mode & stat.S_IWOTH else ""
