"""Runs in a pod: finds the run directory of the pod's command, and prints or sends what is in it.

``python -m launch.pods.run_files state -- COMMAND`` prints the state of the run as JSON, ``where``
its directory, and ``send`` writes files of it to standard output as a tar archive.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from launch.contract import (
    CHECKPOINTS,
    Exit,
    Parser,
    RetryError,
    UsageError,
    exit_code_of,
    run_directory,
    run_train,
)

MODULE = "launch.pods.run_files"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an action and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog=f"python -m {MODULE}")
    parser.add_argument("action", choices=["where", "state", "send"])
    parser.add_argument("--directory", help="the run directory, instead of that of the command")
    parser.add_argument("--path", default=".", help="what to send, relative to the run directory")
    parser.add_argument("--without-checkpoints", action="store_true")

    def act() -> int:
        given = parser.parse_args(argv[:at])
        directory = _directory(given.directory, argv[at + 1 :])
        if given.action == "state":
            return run_train(["runs", "--json", str(directory)], "isorun")
        if given.action == "where":
            print(directory)
            return Exit.DONE
        send(directory, given.path, sys.stdout.buffer, checkpoints=not given.without_checkpoints)
        return Exit.DONE

    return exit_code_of(act)


def _directory(named: str | None, command: Sequence[str]) -> Path:
    """The run directory. Raises UsageError or RetryError."""
    found = Path(named) if named else run_directory([expanded(word) for word in command])
    if found is None:
        raise UsageError(
            "The run directory cannot be told from the command of the pod; name it with "
            "--run-dir DIR, as the pod sees it."
        )
    if not found.is_dir():
        raise RetryError(
            f"The run directory {found} does not exist in the pod; try again when the run has "
            "started."
        )
    return found.absolute()


def expanded(word: str) -> str:
    """A word of a container's command with the references to variables that Kubernetes expands:
    ``$(NAME)``, and ``$$`` for ``$``."""
    return re.sub(
        r"\$(?:(\$)|\(([\w.-]+)\))",
        lambda found: "$" if found[1] else os.environ.get(found[2], found[0]),
        word,
    )


def send(directory: Path, path: str, to: BinaryIO, *, checkpoints: bool) -> None:
    """Writes the regular files at ``path`` below a run directory as a tar archive. A file that goes
    while it is read, or is being written under a temporary name, is left out. Raises UsageError."""
    top = directory / path
    if not top.resolve().is_relative_to(directory.resolve()):
        raise UsageError(f"{path} is not in the run directory {directory}.")
    if not top.exists():
        raise UsageError(f"The run directory {directory} has no {path}.")
    with tarfile.open(fileobj=to, mode="w|") as archive:
        for file in _files(top, [] if checkpoints else [directory / CHECKPOINTS]):
            with suppress(FileNotFoundError), file.open("rb") as opened:
                # Of the open file, which a run may replace meanwhile, as much as it has now.
                info = archive.gettarinfo(fileobj=opened, arcname=_name(file, top))
                info.uid = info.gid = 0
                info.uname = info.gname = ""
                info.type, info.linkname = tarfile.REGTYPE, ""
                info.size = os.fstat(opened.fileno()).st_size
                archive.addfile(info, opened)


def _name(file: Path, top: Path) -> str:
    """Below the name of what is sent, so that the receiver has one file or directory."""
    return str(Path(top.resolve().name) / file.relative_to(top))


def _files(top: Path, left_out: Sequence[Path]) -> Iterator[Path]:
    if top.is_file():
        yield top
        return
    for folder, folders, names in os.walk(top):
        here = Path(folder)
        folders[:] = sorted(
            f for f in folders if here / f not in left_out and not f.startswith(_UNCOMMITTED)
        )
        for name in sorted(names):
            file = here / name
            temporary = name.startswith(".") and name.endswith(".new")
            if not temporary and file.is_file() and not file.is_symlink():
                yield file


_UNCOMMITTED = ".writing"
"""The start of the name of a checkpoint that is being written or removed."""


if __name__ == "__main__":
    sys.exit(main())
