"""Calls git within limits of time and size.

A repository may be huge, on a file system that hangs, or that of another user. Nothing is written
to it, and none of its programs (pagers, external diffs, monitors) is started, except its filters.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_KEPT = (
    "GIT_CONFIG_",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_EXEC_PATH",
)
"""Variables of git that count. Others, such as GIT_DIR of a hook, lead to another repository."""
_OPTIONS = ("--no-pager", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false")
_ERRORS = 1 << 14  # bytes


class GitError(Exception):
    """What git cannot tell; its text says why. ``no_repository`` is true where there is no git, no
    repository or no commit, which is nothing unusual."""

    def __init__(self, why: str, *, no_repository: bool = False) -> None:
        super().__init__(why)
        self.no_repository = no_repository


class TooMuchError(GitError):
    """The output is larger than the limit; ``output`` is its beginning."""

    def __init__(self, output: bytes) -> None:
        super().__init__("its output is too large")
        self.output = output


def git(
    *arguments: str, until: float, limit: int = 1 << 20, directory: Path | None = None
) -> bytes:
    """The output of a git command, by default in the working directory.

    Ends at ``until`` (of ``time.monotonic``) or after ``limit`` bytes. Raises GitError.
    """
    # Files, since a pipe does not end while a process that was forked meanwhile has its other end.
    with _temporary() as out, _temporary() as err:
        try:
            process = subprocess.Popen(
                ["git", *_OPTIONS, *arguments],
                cwd=directory, env=_environment(), process_group=0,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
        except OSError as error:
            raise GitError(f"git cannot be started ({error})", no_repository=True) from None
        started = time.monotonic()
        while process.poll() is None:
            if os.fstat(out.fileno()).st_size > limit:
                break
            if time.monotonic() >= until:
                _kill(process)
                seconds = max(0.0, time.monotonic() - started)
                raise GitError(f"`git {arguments[0]}` did not end within {seconds:.0f} s")
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(0.1, max(0.0, until - time.monotonic())))
        out.seek(0)
        output = out.read(limit)
        if os.fstat(out.fileno()).st_size > limit:
            _kill(process)
            raise TooMuchError(output)
        err.seek(0)
        if process.returncode:
            raise _error(err.read(_ERRORS).decode(errors="replace"))
        return output


def top_of_repository(*, until: float) -> Path:
    """The top of the repository that the working directory is in. Raises GitError."""
    return Path(os.fsdecode(git("rev-parse", "--show-toplevel", until=until)).rstrip("\n"))


def _error(said: str) -> GitError:
    """The error for what git has printed, in English."""
    if "dubious ownership" in said:
        return GitError(
            "another user owns the repository, so git refuses to read it; allow it with "
            f"`git config --global --add safe.directory {Path.cwd()}`"
        )
    last = (said.strip().splitlines() or ["it gave no reason"])[0].removeprefix("fatal: ")
    nothing = ("not a git repository", "unknown revision", "Needed a single revision")
    return GitError(last[:300], no_repository=any(text in said for text in nothing))


def _environment() -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if not n.startswith("GIT_") or n.startswith(_KEPT)}
    # Without locks: `git status` would otherwise write the index, at which the user may be at work.
    return {**kept, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


@contextmanager
def _temporary() -> Iterator[IO[bytes]]:
    """A file without a name; in memory where the system can, since the disk may be full."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("git"), "w+b") as file:
            yield file
    else:
        with tempfile.TemporaryFile() as file:
            yield file


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends git and the programs that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot end
        process.wait(1.0)
