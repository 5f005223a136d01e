"""Finds run directories below a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from train.exits import UsageError
from train.output import log

DEEPEST = 6
"""Levels of directories below the given one that are searched."""
_MARKS = ("run.json", "attempts.jsonl")
"""Files that only a run directory has; one of them may be lost."""


def is_run(directory: Path) -> bool:
    """Whether a directory holds a run, perhaps a damaged one."""
    return any(os.path.lexists(directory / name) for name in _MARKS)


def find_runs(directories: Iterable[Path]) -> list[Path]:
    """The run directories among and below ``directories``, each once, in the order of their paths.

    Does not search inside a run, in hidden directories, or through symbolic links below the given
    directories. Raises UsageError for what is no directory.
    """
    found: dict[tuple[int, int], Path] = {}
    for top in directories:
        if fault := _fault(top):
            raise UsageError(f"{top} {fault}; name directories that hold runs.")
        for path in _below(top, DEEPEST):
            status = path.stat()
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def _fault(top: Path) -> str | None:
    """Why a directory cannot be searched."""
    try:
        if top.is_dir():
            return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is not a directory" if os.path.lexists(top) else "does not exist"


def _below(directory: Path, levels: int) -> Iterator[Path]:
    if is_run(directory):
        yield directory
        return
    if not levels:
        return
    try:
        with os.scandir(directory) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
    except OSError as error:
        log(f"warning: {directory} cannot be searched: {error.strerror}.")
        return
    for name in sorted(names):
        yield from _below(directory / name, levels - 1)
