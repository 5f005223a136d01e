"""The time limit of restarts that nothing else limits.

A JobSet restarts all pods after each failure of the infrastructure, however many there are, and its
API has no time limit for that. So the agent of node 0 marks each restart in the run directory, and
does not start any more when the first one was too long ago.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.contract import FAILURES, ResumeRefusedError, first_line, log, refuse_link, whole_number
from launch.failure_record import last_record, sentence

RESTARTED_BY = "ISORUN_RESTARTED_BY"
"""The variable with the identity of what restarts this agent; it stays through all restarts."""
RESTARTS = "ISORUN_RESTARTS"
"""The variable with the number of restarts so far."""
_MARKS = "restarts"
_UNKNOWN = "unknown"  # older controllers of JobSets do not tell


@dataclass(frozen=True)
class Restart:
    """A start of the agent by something that restarts it."""

    by: str
    number: int
    """0 at the first start. A start after a suspension has the number of the one before."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Restart | None:
        """What the environment tells; None if nothing counts the restarts of this agent."""
        number = whole_number(environ.get(RESTARTS, ""))
        by = environ.get(RESTARTED_BY, "").strip() or _UNKNOWN
        # It becomes a part of a file name.
        is_id = by.replace("-", "").isalnum() and by.isascii() and len(by) <= 64
        return cls(by, number) if is_id and number is not None else None


def check_restart(directory: Path, restart: Restart, deadline: float) -> None:
    """Marks a restart in the run directory. Raises ResumeRefusedError if it comes more than
    ``deadline`` seconds after the first one since the run was last suspended."""
    if not restart.number:
        return
    try:
        first, now = _mark(directory, restart)
    except OSError as error:
        log(
            f"warning: This restart cannot be recorded in {directory} ({first_line(error)}), so "
            f"restarts do not end after {deadline:g} s (--restart-deadline)."
        )
        return
    if now - first > deadline:
        record = last_record(directory)
        last = f"; the last failure: {sentence(record)}" if record else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first))
        raise ResumeRefusedError(
            f"Restarts end {deadline:g} s after the first one (--restart-deadline; in Kubernetes "
            f"timeLimit), and the first of {restart.number} was at {began}{last}; remove what "
            "causes them, or increase the limit, and submit the run again: it resumes from its "
            "last checkpoint."
        )


def _mark(directory: Path, restart: Restart) -> tuple[float, float]:
    """Marks a restart; returns the times of the first one and of this one, in seconds since the
    epoch by the clock of the file system. Raises OSError.

    The marks are empty files, since a full disk, which is a usual reason for endless restarts, has
    no room for others. Only those of the first and the newest restart are kept.
    """
    folder = directory / FAILURES / _MARKS
    refuse_link(folder.parent)
    refuse_link(folder)
    for made in (directory, directory / FAILURES, folder):  # the parent may be a typo
        made.mkdir(exist_ok=True)
    marks = {
        number: file
        for file in folder.iterdir()
        if (number := whole_number(file.name.removeprefix(f"{restart.by}."))) is not None
    }
    # It was suspended meanwhile, which takes no time of the restarts, or is another one.
    if marks and restart.number <= max(marks):
        for file in marks.values():
            file.unlink(missing_ok=True)
        marks = {}
    own = folder / f"{restart.by}.{restart.number}"
    own.touch(exist_ok=False)
    now = own.stat().st_mtime
    earlier = sorted(marks)
    for number in earlier[1:]:
        marks[number].unlink(missing_ok=True)
    return (marks[earlier[0]].lstat().st_mtime if earlier else now), now
