"""Copies files of a run directory from a cluster to this machine."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from launch.contract import RetryError, UsageError
from launch.pods.find import SCHEME, ClusterRun, find_run
from launch.pods.reader import reader
from launch.pods.words import files_command


def copy(
    run: ClusterRun, path: str, to: Path, *, checkpoints: bool = True, directory: str | None = None
) -> Path:
    """Copies a file or directory of the run directory to ``to``, or, if that is a directory, into
    it; ``.``, the whole run directory, becomes ``to``. All of it is there, or nothing. Returns the
    path of the copy. Raises UsageError or RetryError."""
    inner = PurePosixPath(path).name
    target = to / inner if inner and to.is_dir() else to
    if not target.parent.is_dir():
        raise UsageError(
            f"The directory {target.parent} does not exist; make it, or name another one."
        )
    if os.path.lexists(target) and (inner or not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists; name one that does not exist yet, or remove it.")
    words = ["send", "--path", path, *(() if checkpoints else ("--without-checkpoints",))]
    with (
        reader(run) as container,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".isorun-") as folder,
    ):
        with container.stream(files_command(run, words, directory)) as source:
            _unpack(source, Path(folder))
        # A directory without files is sent as nothing.
        (made,) = list(Path(folder).iterdir()) or [Path(folder, "empty")]
        if not made.exists():
            made.mkdir()
        return made.rename(target)


def _unpack(source: IO[bytes], place: Path) -> None:
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                _write(archive, member, place)
    except tarfile.TarError as error:
        raise RetryError(f"The files arrived incomplete ({error}); try again.") from None
    except OSError as error:
        raise RetryError(
            f"The files could not be written to {place.parent}: {error.strerror}; make "
            "room, or name another directory."
        ) from None


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    """Writes one regular file, and never outside of ``place``, whoever has sent the archive."""
    inner = PurePosixPath(member.name)
    content = archive.extractfile(member)
    if content is None or inner.is_absolute() or ".." in inner.parts:
        raise RetryError(
            f"The pod sent {member.name!r}, which is no file of a run; nothing is kept."
        )
    file = place / inner
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as opened:
        shutil.copyfileobj(content, opened)
    os.utime(file, (member.mtime, member.mtime))


READING = ("checkpoints", "compare", "goodput", "logs", "report", "runs")
"""Commands of training that read run directories; they take handles of runs on a cluster."""


@contextmanager
def local_copies(argv: Sequence[str]) -> Iterator[list[str]]:
    """The words of a command with each handle of a run on a cluster replaced by a copy of its run
    directory, without its checkpoints, which is removed at the end. Raises UsageError or
    RetryError."""
    if argv[0] not in READING:
        raise UsageError(
            f"`{argv[0]}` does not read runs on a cluster; copy the run first: isorun cluster cp "
            f"{next(word for word in argv if word.startswith(SCHEME))} DIR."
        )
    for word in ("--watch", "-f", "--follow"):
        if word in argv:
            raise UsageError(
                f"{word} does not follow a run on a cluster, whose files are copied once; remove "
                "it, or use `torchx log --tail` or `isorun cluster tensorboard`."
            )
    with ExitStack() as stack:
        words = []
        for word in argv:
            if not word.startswith(SCHEME):
                words.append(word)
                continue
            run = find_run(word)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="isorun-"))
            words.append(str(copy(run, ".", Path(folder, run.name), checkpoints=False)))
        yield words
