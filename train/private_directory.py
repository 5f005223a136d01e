"""Directories that only this user can read and write, such as those for caches that hold code.

By default torch.compile takes compiled code from a directory in the temporary directory whose name
everyone knows, so that another user can put code there first.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from train.exits import UsageError

_VARIABLES = {
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "QUACK_CACHE_DIR": "quack",
}


def use_private_caches() -> None:
    """Sets the cache directories of torch.compile, where the environment does not, to private ones
    below the user's cache home. If these cannot be written to, or belong to another user, which is
    also what an NFS server tells a root that it does not trust, the caches are temporary.
    """
    missing = {name: below for name, below in _VARIABLES.items() if not os.environ.get(name)}
    if not missing:
        return
    base = cache_home() / "isorun"
    try:
        if not base.is_absolute():  # there is no home directory
            raise FileNotFoundError(base)
        private_directory(base)
        for below in missing.values():
            private_directory(base / below)
    except (OSError, UsageError):
        base = Path(tempfile.mkdtemp(prefix="isorun-cache-"))  # mode 0700
        atexit.register(shutil.rmtree, base, ignore_errors=True)
    os.environ.update({name: str(base / below) for name, below in missing.items()})


def cache_home() -> Path:
    """$XDG_CACHE_HOME, by default ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return given if given.is_absolute() else Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111


def private_directory(path: Path) -> None:
    """Creates a directory with mode 0700, or makes an existing one of this user private.

    Raises UsageError for one that belongs to another user, also behind a link, and OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid():
        status = path.stat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UsageError(
            f"{path} is not a directory of this user, so another user may have written what it "
            "holds; remove it, or set XDG_CACHE_HOME or XDG_STATE_HOME to another directory."
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)
