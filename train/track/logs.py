"""Logging: a rotating file per rank; on rank 0 warnings also on standard error."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from train.exits import shortened
from train.files import open_regular, refuse_link
from train.secrets import redact
from train.visible import visible

_BYTES, _FILES = 10 * 2**20, 3
_LONGEST = 200_000  # characters of a message with its traceback


class _File(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        descriptor = open_regular(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Ignores errors, such as a full disk, instead of printing a traceback."""


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The line and its traceback."""
        return redact(shortened(super().format(record), _LONGEST))


class _Stderr(logging.Handler):
    """One line per warning on the current ``sys.stderr``, which a progress bar redirects.

    Repeated warnings of libraries are shown once; the log file has all of them.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.name == "train" and record.levelno >= logging.ERROR:
                return  # it ends the run and is printed by the command line
            if record.name != "train":
                text = text.strip().partition("\n")[0]
                if text in self._seen:
                    return
                self._seen.add(text)
            text = visible(redact(shortened(text, _LONGEST)))
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Ignores errors; the log file has the line."""


def setup_logging(directory: Path, rank: int, attempt: int, level: str) -> None:
    """Logs messages of ``level`` and above, with Python's warnings, to logs/rank-<rank>.log.

    On rank 0, warnings, and the errors of libraries, also go to standard error. The file is kept
    across attempts and rotated at 10 MiB, with two older files. DEBUG messages of libraries are
    excluded.
    """
    path = directory / "logs" / f"rank-{rank}.log"
    refuse_link(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path, maxBytes=_BYTES, backupCount=_FILES - 1, encoding="utf-8")
    file.setFormatter(
        _WithoutSecrets(
            f"%(asctime)s %(levelname)s attempt {attempt} rank {rank} %(name)s: %(message)s"
        )
    )
    # On the handler as well: some of torch's loggers set themselves to DEBUG.
    file.setLevel(level)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, (_File, _Stderr))]:
        root.removeHandler(old)  # of an earlier run in this process
        with suppress(OSError):
            old.close()
    root.addHandler(file)
    if rank == 0:
        root.addHandler(_Stderr())
    lowest = min(logging.getLevelNamesMapping()[level], logging.WARNING)
    logging.getLogger("train").setLevel(lowest)
    root.setLevel(max(lowest, logging.INFO))
    logging.captureWarnings(True)
