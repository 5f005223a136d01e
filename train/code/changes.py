"""The changes of an attempt's code since its commit, as they are stored: code/attempt-N.diff.

The file is a patch. Lines before it, which start with ``#``, say what it lacks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from train.files import read_bytes, refuse_link, replace_text

CODE = "code"
"""The directory in the run directory."""
LARGEST = 128 << 20
"""The largest file that is read, in bytes."""
_FILE = re.compile(r"^(?=diff --(?:git|cc|combined) )", re.MULTILINE)
_NAME = re.compile(r"attempt-([1-9]\d{0,8})\.diff")


@dataclass(frozen=True)
class FileChange:
    """The change of a file."""

    path: str
    """Relative to the top of the repository; as git quotes it."""
    text: str
    """Its part of the patch."""

    @cached_property
    def counts(self) -> tuple[int, int]:
        """The numbers of lines added and removed."""
        _, _, body = self.text.partition("\n@@")
        lines = body.split("\n")[1:]
        return sum(line[:1] == "+" for line in lines), sum(line[:1] == "-" for line in lines)

    def __str__(self) -> str:
        added, removed = self.counts
        return f"+{added} -{removed} ({hashlib.sha256(self.text.encode()).hexdigest()[:8]})"


@dataclass(frozen=True)
class Changes:
    """What differs from the commit."""

    files: list[FileChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences about what is left out."""

    @property
    def text(self) -> str:
        """What is stored."""
        return "".join([*(f"# {note}\n" for note in self.notes), *(f.text for f in self.files)])


def path_of(directory: Path, attempt: int) -> Path:
    """Where a run directory has the changes of an attempt."""
    return directory / CODE / f"attempt-{attempt}.diff"


def write(changes: Changes, directory: Path, attempt: int) -> Path:
    """Stores the changes; raises OSError, for a link in place of the directory as well."""
    path = path_of(directory, attempt)
    refuse_link(path.parent)
    path.parent.mkdir(exist_ok=True)  # never the run directory, if it was moved
    replace_text(path, changes.text)
    return path


def read(directory: Path, attempt: int) -> Changes | None:
    """The changes of an attempt; None where there are none, or they cannot be read."""
    path = path_of(directory, attempt)
    try:
        refuse_link(path.parent)
        text = read_bytes(path, LARGEST).decode(errors="replace")
    except OSError:
        return None
    head, *parts = _FILE.split(text)
    return Changes(
        list(split(parts)), [line[2:] for line in head.splitlines() if line.startswith("# ")]
    )


def attempts_with_changes(directory: Path) -> list[int]:
    """The attempts of which a run directory has changes, ascending."""
    try:
        refuse_link(directory / CODE)
        names = [_NAME.fullmatch(entry.name) for entry in (directory / CODE).iterdir()]
    except OSError:
        return []
    return sorted(int(name[1]) for name in names if name)


def split_patch(text: str) -> list[FileChange]:
    """A patch of git, by file."""
    return list(split(part for part in _FILE.split(text) if part.startswith("diff --")))


def split(parts: Iterable[str]) -> Iterator[FileChange]:
    """The changes for the parts of a patch."""
    for part in parts:
        yield FileChange(_path(part), part)


def _path(part: str) -> str:
    """The path in the first line. Without renames, both of its paths are the same."""
    line = part.partition("\n")[0]
    if not line.startswith("diff --git "):  # a merge has one path
        return line.split(" ", 2)[2]
    both = line.removeprefix("diff --git ")
    one = both[: len(both) // 2]
    return one.strip('"').removeprefix("a/")
