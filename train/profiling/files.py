"""profile/: the traces of a run, by attempt, rank and step.

``attempt-K/rank-N-step-S.pt.trace.json.gz`` is the trace of rank N that ends with step S.
``attempt-K/rank-N.memory.pickle`` is a memory snapshot of CUDA's allocator.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from train.files import refuse_irregular, refuse_link

PROFILE = "profile"
_ATTEMPT = re.compile(r"attempt-([0-9]{1,9})")
_TRACE = re.compile(r"rank-([0-9]{1,9})-step-([0-9]{1,18})\.pt\.trace\.json\.gz")


class Trace(NamedTuple):
    """A trace file of a run; the newest is the largest."""

    attempt: int
    step: int
    """The last step in it."""
    rank: int
    path: Path


def attempt_folder(run_directory: Path, attempt: int) -> Path:
    """Where the files of an attempt are."""
    return run_directory / PROFILE / f"attempt-{attempt}"


def make_folder(run_directory: Path, attempt: int) -> Path:
    """Makes the folder of an attempt. Raises OSError, for a link in its place as well."""
    folder = attempt_folder(run_directory, attempt)
    for directory in (folder.parent, folder):
        refuse_link(directory)
        directory.mkdir(exist_ok=True)  # never the run directory, if it was moved
    return folder


def trace_name(rank: int, step: int) -> str:
    """The name of a trace file."""
    return f"rank-{rank}-step-{step}.pt.trace.json.gz"


def snapshot_name(rank: int) -> str:
    """The name of the memory snapshot of a rank."""
    return f"rank-{rank}.memory.pickle"


def find_traces(run_directory: Path, attempt: int | None = None) -> list[Trace]:
    """The traces of a run, or of one attempt, from the oldest to the newest. Raises OSError, for a
    link in place of a directory as well."""
    found = []
    for number, folder in _folders(run_directory):
        if attempt in (None, number):
            names = (_TRACE.fullmatch(entry) for entry in _entries(folder))
            found += [Trace(number, int(n[2]), int(n[1]), folder / n[0]) for n in names if n]
    return sorted(found)


def _folders(run_directory: Path) -> list[tuple[int, Path]]:
    parent = run_directory / PROFILE
    names = (_ATTEMPT.fullmatch(entry) for entry in _entries(parent))
    return [(int(name[1]), parent / name[0]) for name in names if name]


def _entries(folder: Path) -> list[str]:
    refuse_link(folder)
    return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208


class NewTraces:
    """The traces of an attempt, each given once."""

    def __init__(self, run_directory: Path, attempt: int) -> None:
        self._directory, self._attempt = run_directory, attempt
        self._given: set[Path] = set()

    def take(self) -> list[Trace]:
        """Those since the last call, of all ranks whose files are in this run directory. Raises
        OSError."""
        traces = find_traces(self._directory, self._attempt)
        new = [trace for trace in traces if trace.path not in self._given]
        self._given.update(trace.path for trace in new)
        return new


def place_copy(source: Path, target: Path) -> None:
    """Gives a file of the run directory a second name in it; where the file system has no hard
    links, copies it. Raises OSError."""
    refuse_irregular(source)
    with suppress(FileNotFoundError):
        target.unlink()
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target)
