"""Whose configs may name code.

To import a dotted path such as ``my_project.task:MyTask`` runs its module, so neither an export nor
the config of another user's run chooses one. A dotted path is trusted if the command line or a
config file names it, literally and for the same key, or if it is a default: this is decided from
what these have set, and not from where a value seems to come from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config.compose import Composed
from train.config.leaves import key_path, leaves
from train.exits import UsageError
from train.imports import is_dotted_path
from train.tasks.registry import BUILT_IN

TASK_SECTIONS = ("task", "model", "data")
"""What the commands read that load a model without training it, besides ``strategy``."""


def dotted_paths(values: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and value of each text that has the form of a dotted path, except built-in tasks."""
    for path, value in leaves(values):
        keys = key_path(path)
        is_built_in = keys == ("task", "use") and value in BUILT_IN.values()
        if isinstance(value, str) and is_dotted_path(value) and not is_built_in:
            yield keys, value


def refuse_code_of_others(
    composed: Composed,
    sections: Sequence[str] | None = None,
    received: Mapping[str, str] | None = None,
) -> None:
    """Raises UsageError if a dotted path comes from another user's run.

    ``sections``: those that are used; None for all. ``received``: stored configs that came from
    elsewhere, and so may be anybody's, with the artifact they came from.
    """
    received = received or {}
    stored = {part.name for part in composed.parts if part.is_stored}
    others = {name: owner for name in stored if (owner := _other_owner(Path(name)))}
    others |= {
        name: f"comes from {received[name]}, which others may have made"
        for name in stored & received.keys()
    }
    if not others:
        return
    trusted = {
        named
        for part in composed.parts
        if part.name not in others
        for named in dotted_paths(part.values)
    }
    for keys, value in dotted_paths(composed.values):
        if (keys, value) in trusted or (sections is not None and keys[0] not in sections):
            continue
        key = ".".join(keys)
        named_in = [
            part.name
            for part in composed.parts
            if part.name in others and (keys, value) in dotted_paths(part.values)
        ]
        file = named_in[-1] if named_in else next(iter(others))
        where = f"in {file}" if named_in else f"by a reference (${{...}}) that may read {file}"
        raise UsageError(
            f"{key} is {value!r} {where}, which {others[file]}, and importing it runs code; "
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
