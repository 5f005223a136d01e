"""TorchX's nightly in a separate directory that precedes the installed version in the path."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.cache import installed

VERSION = "torchx-nightly==2026.10.26"


def directory():
    """The directory of the nightly. Its dependencies are those of the installed version."""
    return installed(VERSION, "--no-deps")


def run(*command, cwd, expect=0, **environ):
    """Runs a Python command with the nightly instead of the installed version."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(directory()), **environ},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def torchx(*words, cwd, **kwargs):
    """Runs TorchX's own command."""
    return run(str(Path(sys.executable).with_name("torchx")), *words, cwd=cwd, **kwargs)
