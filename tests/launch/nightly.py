"""TorchX's nightly in a directory of its own, which goes before the installed version."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.cache import installed

VERSION = "torchx-nightly==2026.10.26"


def directory():
    """Where it is. What it depends on is what the installed version depends on."""
    return installed(VERSION, "--no-deps")


def run(*command, cwd, expect=0, **environ):
    """A command of Python's with the nightly in place of the installed version."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(directory()), **environ},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def torchx(*words, cwd, **kwargs):
    """TorchX's own command."""
    return run(str(Path(sys.executable).with_name("torchx")), *words, cwd=cwd, **kwargs)
