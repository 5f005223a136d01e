"""The version of the package, and the git commit of the working directory."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from train.code.git import GitError, git
from train.version import __version__

CODE_VERSION = "ISORUN_CODE_VERSION"
"""What is known of code that was brought here without its repository, set by what brought it: a
JSON object with ``commit``, ``dirty``, and the digest of the code as ``bundle``."""
SECONDS = 5.0
"""How long the start of a run waits for git."""


def code_version() -> dict[str, Any]:
    """The package version and, in a git repository, the commit and whether it is dirty. Where git
    fails, ``git`` says why. See also ``CODE_VERSION``."""
    version: dict[str, Any] = {"isorun": __version__}
    if given := _given():
        return version | given
    until = time.monotonic() + SECONDS
    try:
        version["commit"] = git("rev-parse", "HEAD", until=until).decode().strip()
        changed = git("status", "--porcelain", "--untracked-files=no", until=until, limit=1 << 24)
        version["dirty"] = bool(changed.strip())
    except GitError as error:
        if not error.no_repository:
            version["git"] = str(error)
    return version


def _given() -> dict[str, Any]:
    kinds = {"commit": str, "dirty": bool, "bundle": str}
    try:
        values = json.loads(os.environ.get(CODE_VERSION) or "{}")
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key, kind in kinds.items() if type(values.get(key)) is kind}
