"""The version of the package, and the git commit of the working directory."""

from __future__ import annotations

import time
from typing import Any

from train.code.git import GitError, git
from train.version import __version__

SECONDS = 5.0
"""How long the start of a run waits for git."""


def code_version() -> dict[str, Any]:
    """The package version and, in a git repository, the commit and whether it is dirty. Where git
    fails, ``git`` says why."""
    version: dict[str, Any] = {"isorun": __version__}
    until = time.monotonic() + SECONDS
    try:
        version["commit"] = git("rev-parse", "HEAD", until=until).decode().strip()
        changed = git("status", "--porcelain", "--untracked-files=no", until=until, limit=1 << 24)
        version["dirty"] = bool(changed.strip())
    except GitError as error:
        if not error.no_repository:
            version["git"] = str(error)
    return version
