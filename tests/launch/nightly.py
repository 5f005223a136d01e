"""TorchX's nightly in a directory of its own, which goes before the installed version."""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.support.runs import ROOT

VERSION = "torchx-nightly==2026.10.26"


@cache
def directory():
    """Where it is; fetched once and kept. Skips where pip cannot fetch it."""
    target = ROOT / ".cache" / VERSION.replace("==", "-")
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent))
        done = subprocess.run(
            # What it depends on is what the installed version depends on.
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", fresh,
             "--disable-pip-version-check", VERSION],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            shutil.rmtree(fresh)
            pytest.skip(f"pip cannot fetch {VERSION}: {done.stderr.strip().splitlines()[-1]}")
        try:
            fresh.rename(target)
        except OSError:  # somebody else was faster
            shutil.rmtree(fresh)
    return target


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
