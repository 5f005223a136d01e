"""Files of a directory that are replaced together, once all are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from train.files import refuse_link
from train.process.cleanup import cleanup


@contextmanager
def replacing_files(directory: Path, last: str) -> Iterator[Path]:
    """A new directory within ``directory``, whose files replace those there at the end; ``last`` is
    the name of the file that is moved last. After an error the files stay as they were, and
    directories that were made for them are removed. Raises OSError."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    temporary = directory / ".new"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_link(temporary)
        if temporary.exists():  # of a process that was killed
            shutil.rmtree(temporary)
        temporary.mkdir()
        with cleanup(lambda: _remove(temporary, made)):
            yield temporary
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                path.replace(directory / path.name)
    except BaseException:
        _remove(temporary, made)
        raise


def _remove(temporary: Path, made: Sequence[Path]) -> None:
    """Removes the new directory, and those that were made for it if nothing is in them."""
    shutil.rmtree(temporary, ignore_errors=True)
    for path in made:
        with suppress(OSError):
            path.rmdir()
