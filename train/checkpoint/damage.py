"""Errors for files of a run directory that are damaged, or not of the kind that they should be."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.exits import ResumeRefusedError, RetryError, RunError
from train.files import NotRegularError, TooLargeError

# A retry meets the same file again.
_WRONG_KIND = (
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EACCES, errno.EPERM,
    errno.EROFS, errno.ENOTEMPTY,
)  # fmt: skip


class DamagedError(Exception):
    """A checkpoint differs from what was committed; the text names the file and the fault."""


NOT_A_FILE = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, NotRegularError, TooLargeError,
)  # fmt: skip
"""Any other OSError is a fault of the machine: the checkpoint itself may be valid."""


def damaged(path: Path, why: object) -> ResumeRefusedError:
    """The error for a file without which the run cannot be identified."""
    return ResumeRefusedError(
        f"{path} is damaged ({why}), so the run cannot be identified; restore the file, or start a "
        "new run in another run.dir."
    )


def unusable(path: Path, error: OSError) -> RunError:
    """The error for a file of the run directory that the system refuses: 76 where a retry meets the
    same, such as a directory in place of a file, else 75."""
    names = [name for name in (error.filename2, error.filename) if isinstance(name, str)]
    where = Path(names[0]) if names else path  # of a rename: its target
    reason = error.strerror or str(error)
    if error.errno in _WRONG_KIND or isinstance(error, TooLargeError):
        return ResumeRefusedError(
            f"{where} cannot be used ({reason}); correct its kind or its rights, or choose another "
            "run.dir."
        )
    return RetryError(f"{where} cannot be used ({reason}); fix the cause, then rerun.")


@contextmanager
def refused_files(directory: Path) -> Iterator[None]:
    """Turns errors about the kind or the rights of files in a run directory into one sentence."""
    try:
        yield
    except OSError as error:
        if _is_inside(error, directory) and (
            error.errno in _WRONG_KIND or isinstance(error, TooLargeError)
        ):
            raise unusable(directory, error) from error
        raise


def became_read_only(error: BaseException, directory: Path) -> bool:
    """Whether a run directory that this attempt has written to can only be read now: a fault of the
    storage, after which a file system may protect itself."""
    if not isinstance(error, OSError) or error.errno != errno.EROFS:
        return False
    return _is_inside(error, directory)


def _is_inside(error: OSError, directory: Path) -> bool:
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    return any(Path(name).is_relative_to(directory) for name in names)
