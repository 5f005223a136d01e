"""Small file systems that can be full or read-only. Skips the test if mounting is not permitted."""

import os
import subprocess
from contextlib import contextmanager

import pytest


def _mount(*arguments):
    try:
        done = subprocess.run(
            ["mount", *map(str, arguments)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")


@contextmanager
def _mounted(path, *arguments):
    path.mkdir(parents=True, exist_ok=True)
    _mount(*arguments, path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def small_disk(path, options):
    """A tmpfs with mount options such as ``size=1m``; unmounted at the end."""
    return _mounted(path, "-t", "tmpfs", "-o", options, "tmpfs")


def resize(path, size):
    """Changes the size of the tmpfs."""
    _mount("-o", f"remount,size={size}", path)


@contextmanager
def read_only(path):
    """Makes a directory read-only."""
    with _mounted(path, "--bind", path):
        _mount("-o", "remount,bind,ro", path)
        yield


def fill(path):
    """Fills the file system to the last byte; returns the file that does."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    stat = os.statvfs(path)
    assert stat.f_bavail == 0
    return filler
