"""What is removed at the end of a context, also where a stop signal ends the process in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

_open: list[Callable[[], None]] = []


@contextmanager
def cleanup(remove: Callable[[], None]) -> Iterator[None]:
    """Calls ``remove`` at the end, or in another thread when the process is ended."""
    _open.append(remove)
    try:
        yield
    finally:
        _open.remove(remove)
        remove()


@contextmanager
def temporary_directory(prefix: str = "isorun-") -> Iterator[Path]:
    """A directory that is removed at the end."""
    path = Path(mkdtemp(prefix=prefix))
    with cleanup(lambda: shutil.rmtree(path, ignore_errors=True)):
        yield path


def clean_up() -> None:
    """Removes what open contexts would remove, the last opened first."""
    for remove in reversed(_open):
        with suppress(Exception):  # the process ends anyway
            remove()
