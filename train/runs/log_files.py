"""The log files of a run: a file per rank, with older files that the logger has rotated."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from train.checkpoint.damage import unusable
from train.files import open_regular, refuse_link
from train.output import log

_NAME = re.compile(r"rank-(\d{1,9})\.log(?:\.(\d{1,3}))?")


def log_files(run: Path) -> dict[int, list[Path]]:
    """The files of each rank, the newest first: rank-0.log, rank-0.log.1 ... Raises RunError if
    ``logs`` is a link or a file."""
    folder, found = run / "logs", []
    try:
        refuse_link(folder)
        for path in folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2] or 0), path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unusable(folder, error) from error
    ranks: dict[int, list[Path]] = {}
    for rank, _, path in sorted(found):
        ranks.setdefault(rank, []).append(path)
    return ranks


def opened(paths: Sequence[Path], stack: ExitStack) -> list[BufferedReader]:
    """The files of a rank, the oldest first; each once, also if they are rotated meanwhile. Those
    that cannot be opened are left out, with a warning."""
    files: list[BufferedReader] = []
    known = set()
    for path in (*paths, _next(paths[-1])):
        with suppress(FileNotFoundError):
            try:
                file = stack.enter_context(os.fdopen(open_regular(path), "rb"))
            except FileNotFoundError:
                raise
            except OSError as error:
                log(f"warning: {path} cannot be read: {error.strerror}.")
                continue
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) not in known:
                known.add((status.st_dev, status.st_ino))
                files.insert(0, file)
    return files


def _next(oldest: Path) -> Path:
    """The name that the oldest file gets if the files are rotated now."""
    base, _, number = oldest.name.rpartition(".")
    return oldest.with_name(f"{base}.{int(number) + 1}" if number != "log" else f"{oldest.name}.1")


def allow_open_files(count: int) -> None:
    """Raises the limit of open files for ``count`` more, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
