"""Downloads and installations that tests keep between sessions, outside the repository."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = Path(
    os.environ.get("ISORUN_TEST_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isorun-tests"
)


def cached(name, make):
    """The directory CACHE/name. ``make(directory)`` fills it if it does not exist; it appears only
    when it is complete."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".making-") as directory:
            made = Path(directory) / "made"
            made.mkdir()
            make(made)
            try:
                made.rename(path)
            except OSError:  # another session created it first
                assert path.exists()
    return path


def installed(package, *options):
    """A directory for PYTHONPATH with ``name==version`` and its dependencies, separate from the
    environment. Skips the test if pip cannot fetch it."""

    def install(directory):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             *options, "--target", directory, package],
            capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"pip cannot fetch {package}: {done.stderr.strip().splitlines()[-1]}")

    return cached(
        f"{package.replace('==', '-')}-py{sys.version_info[0]}{sys.version_info[1]}", install
    )
