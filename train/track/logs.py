"""A rotating log file for each rank; warnings of libraries go there too."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

_BYTES, _FILES = 10 * 2**20, 3


class _QuietHandler(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """A line that cannot be written, on a full disk, is not worth a traceback on stderr."""


def setup_logging(directory: Path, rank: int, attempt: int, level: str) -> logging.Handler:
    """Sends everything from ``level`` on, Python's warnings included, to logs/rank-<rank>.log.

    The file is kept across attempts and rotated at 10 MiB, with two older ones kept.
    """
    path = directory / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _QuietHandler(path, maxBytes=_BYTES, backupCount=_FILES - 1, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s %(levelname)s attempt {attempt} rank {rank} %(name)s: %(message)s"
        )
    )
    # On the handler as well: some of torch's loggers set themselves to DEBUG.
    handler.setLevel(level)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, RotatingFileHandler)]:
        root.removeHandler(old)  # an earlier run in this process
        old.close()
    root.addHandler(handler)
    logging.getLogger("train").setLevel(level)
    logging.captureWarnings(True)
    return handler
