"""Collects the changes of the working tree since the commit: what git shows, and new source files.

Secrets are left out by the names of their files (``train.secret_files``), or replaced by ``***``.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath

from train.code.changes import Changes, FileChange, split_patch, write
from train.code.git import GitError, TooMuchError, git, top_of_repository
from train.files import open_regular
from train.secret_files import is_secret_file
from train.secret_names import secret_variables
from train.secrets import HIDDEN, redact

SECONDS = 10.0
"""The most time that git gets, in the background."""
_PATCH = 32 << 20
"""The most bytes of git's patch that are read, to choose from."""
_NAMED = 100
"""The most files that are named as left out."""
_SOURCE = {
    ".py", ".pyi", ".pyx", ".pxd", ".ipynb", ".c", ".cc", ".cpp", ".cxx", ".h", ".hpp", ".cu",
    ".cuh", ".rs", ".go", ".js", ".ts", ".jl", ".r", ".sh", ".bash", ".sbatch", ".sql", ".yaml",
    ".yml", ".toml", ".cfg", ".ini", ".jinja", ".j2", ".cmake",
}  # fmt: skip
_SOURCE_NAMES = {"makefile", "dockerfile", "requirements.txt", "constraints.txt"}
_KEY = re.compile(r"-----(?:BEGIN|END) [A-Z0-9 ]{0,40}PRIVATE KEY")
_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


class CodeRecord:
    """Collects the changes in a thread, from the start of an attempt on, and stores them in the run
    directory once the attempt is recorded there. ``kilobytes`` is the largest size of the file, in
    1000 bytes."""

    def __init__(self, directory: Path, attempt: int, kilobytes: int) -> None:
        self._directory, self._attempt, self._limit = directory, attempt, kilobytes * 1000
        self._path: Path | None = None
        self._recorded, self._is_recorded = threading.Event(), False
        # A daemon thread: a git that hangs must not block the exit.
        self._thread = threading.Thread(target=self._collect, name="code", daemon=True)
        self._thread.start()

    def store(self) -> None:
        """Lets the thread write the file; does not wait for it."""
        self._is_recorded = True
        self._recorded.set()

    def wait(self, seconds: float = SECONDS + 2) -> Path | None:
        """The file with the changes; None without changes, or where they take longer."""
        if self._is_recorded:
            self._thread.join(seconds)
        return self._path

    def close(self) -> None:
        """Gives a short run some time to write the file."""
        self.wait(2.0)
        self._recorded.set()

    def _collect(self) -> None:
        found = collect(self._limit, self._directory)
        self._recorded.wait()
        if self._is_recorded and (found.files or found.notes):
            with suppress(OSError):  # a full disk, or a run directory that was moved
                self._path = write(found, self._directory, self._attempt)


def collect(limit: int, run_directory: Path, seconds: float = SECONDS) -> Changes:
    """The changes in the repository of the working directory, in about ``limit`` bytes. Files of
    run directories, such as ``run_directory``, are none."""
    until = time.monotonic() + seconds
    try:
        top = top_of_repository(until=until)
        patch, whole = _patch(top, until)
        new, all_new = _new_files(top, until)
    except GitError as error:
        return Changes(notes=[] if error.no_repository else [f"Not recorded: {error}."])
    hide = _Hide()
    chosen = _Chosen(limit)
    for change in split_patch(patch):
        chosen.add(change.path, partial(_changed_file, change, limit, hide))
    runs = _RunFiles(top, run_directory)
    for name in new:
        if time.monotonic() > until:
            all_new = False
            break
        if not runs.has(name):
            shown = _shown(name)
            chosen.add(shown, partial(_new_file, top / name, shown, limit, hide))
    notes = chosen.notes
    if not whole:
        notes.append(f"Left out: later files of the patch, of which {_PATCH >> 20} MiB are read.")
    if not all_new:
        notes.append("Left out: some of the new files, which are too many.")
    return Changes(chosen.files, notes)


class _LeftOutError(Exception):
    """Why a file is left out."""

    @classmethod
    def too_large(cls, size: int) -> _LeftOutError:
        """More bytes than there is space for."""
        return cls(f"{size:,} bytes, more than track.code_diff_kb leaves")


class _Chosen:
    """What fits into the limit, and what is left out."""

    def __init__(self, limit: int) -> None:
        self.files: list[FileChange] = []
        self._left = limit
        self._left_out: list[str] = []

    def add(self, path: str, make: Callable[[], str]) -> None:
        """Adds the patch that ``make`` returns, unless it raises _LeftOutError or is too large."""
        try:
            patch = make()
            size = len(patch.encode())
            if size > self._left:
                raise _LeftOutError.too_large(size)
        except _LeftOutError as error:
            self._left_out.append(f"Left out: {redact(path)} ({error}).")
        else:
            self._left -= size
            self.files.append(FileChange(path, patch))

    @property
    def notes(self) -> list[str]:
        """Sentences about what is left out."""
        more = len(self._left_out) - _NAMED
        rest = [f"Left out: {more:,} more files."] if more > 0 else []
        return [*self._left_out[:_NAMED], *rest]


class _Hide:
    """Replaces secrets in a text: those that it shows, and those of the environment."""

    def __init__(self) -> None:
        self._secrets = sorted(secret_variables(os.environ).values(), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return redact(text)


class _RunFiles:
    """Tells files of run directories from source files."""

    def __init__(self, top: Path, run_directory: Path) -> None:
        self._top = top
        self._is_run = cache(self._find)
        self._own = ""
        with suppress(ValueError, OSError):
            self._own = run_directory.resolve().relative_to(top.resolve()).as_posix() + "/"

    def _find(self, directory: PurePosixPath) -> bool:
        return (self._top / directory / "run.json").exists()

    def has(self, name: str) -> bool:
        """Whether a file is one of a run."""
        if self._own and name.startswith(self._own):
            return True
        return any(map(self._is_run, [*PurePosixPath(name).parents][:-1]))


def _patch(top: Path, until: float) -> tuple[str, bool]:
    """The patch from the commit to the working tree, and whether it is whole."""
    base = "HEAD"
    try:
        git("rev-parse", "--verify", "--quiet", "HEAD", until=until, directory=top)
    except GitError:
        base = _EMPTY_TREE  # before the first commit
    try:
        found = git(
            "diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames",
            "--no-relative", "--src-prefix=a/", "--dst-prefix=b/", "--ignore-submodules=dirty",
            "--submodule=short", base, "--",
            until=until, limit=_PATCH, directory=top,
        )  # fmt: skip
        return found.decode(errors="replace"), True
    except TooMuchError as error:
        parts = split_patch(error.output.decode(errors="replace"))
        return "".join(part.text for part in parts[:-1]), False


def _new_files(top: Path, until: float) -> tuple[list[str], bool]:
    """The files that git does not know and does not ignore, and whether these are all."""
    try:
        listed, whole = (
            git("ls-files", "--others", "--exclude-standard", "-z", until=until, directory=top),
            True,
        )
    except TooMuchError as error:
        listed, whole = error.output.rpartition(b"\0")[0], False
    return [os.fsdecode(name) for name in listed.split(b"\0") if name], whole


def _changed_file(change: FileChange, limit: int, hide: _Hide) -> str:
    """The patch of a file that the commit has."""
    _refuse_secrets(change.path)
    if len(change.text) > limit:
        raise _LeftOutError.too_large(len(change.text))
    if "\nBinary files " in change.text or "\nGIT binary patch" in change.text:
        raise _LeftOutError("binary")
    _refuse_keys(change.text)
    return hide(change.text)


def _new_file(file: Path, name: str, limit: int, hide: _Hide) -> str:
    """The patch that creates a file which git does not know."""
    _refuse_secrets(name)
    parts = PurePosixPath(name.lower())
    if parts.suffix not in _SOURCE and parts.name not in _SOURCE_NAMES:
        raise _LeftOutError("new, and no source file")
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > limit:
                raise _LeftOutError.too_large(size)
            data = opened.read(limit)
    except OSError as error:
        raise _LeftOutError(f"new, and cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise _LeftOutError("binary")
    text = data.decode(errors="replace")
    _refuse_keys(text)
    return _as_patch(name, hide(text))


def _refuse_secrets(name: str) -> None:
    if is_secret_file(name):
        raise _LeftOutError("its name is that of a secret")


def _refuse_keys(text: str) -> None:
    if _KEY.search(text):  # in a patch, `redact` could miss a part of one
        raise _LeftOutError("it has a private key")


def _shown(name: str) -> str:
    """The name of a file, which may have any bytes, as one line of text."""
    text = name.encode(errors="replace").decode()
    return text if text.isprintable() else ascii(text)


def _as_patch(name: str, text: str) -> str:
    """A new file as git shows it."""
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if not text:
        return head
    lines = text.removesuffix("\n").split("\n")  # a form feed ends no line
    body = "".join(f"+{line}\n" for line in lines)
    end = "" if text.endswith("\n") else "\\ No newline at end of file\n"
    return f"{head}--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{body}{end}"
