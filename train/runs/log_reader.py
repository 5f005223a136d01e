"""Reads the log files of all ranks, merged by time: what there is, and what is added later."""

from __future__ import annotations

import heapq
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from train.runs.log_files import allow_open_files, log_files, opened
from train.runs.log_lines import LONGEST, Line, parsed


class LogReader:
    """A context manager that reads the logs of a run, or of some of its ranks. A line of each rank
    is in memory."""

    def __init__(self, run: Path, ranks: Collection[int] | None = None) -> None:
        self._run, self._wanted = run, ranks
        self._ranks: dict[int, _Rank] = {}

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks.values():
            rank.close()

    def new_lines(self, *, at_end: bool) -> Iterator[Line]:
        """The lines since the last call, also of ranks that have started since, sorted by time.
        ``at_end``: a last line without its end is given as well, since nothing follows."""
        wanted = {
            rank: paths
            for rank, paths in log_files(self._run).items()
            if self._wanted is None or rank in self._wanted
        }
        allow_open_files(sum(map(len, wanted.values())))
        for rank, paths in wanted.items():  # all before the first is read: they may be rotated
            self._ranks.setdefault(rank, _Rank(rank)).look(paths)
        each = [rank.lines(at_end) for rank in self._ranks.values()]
        return heapq.merge(*each, key=lambda line: line.order)


class _Rank:
    """The files of a rank, the oldest first; to all but the last nothing is added any more."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._files: list[BufferedReader] = []
        self._looked: tuple[int, int] | None = None
        """Device and inode of the newest file when ``look`` last opened files."""
        self._newest: tuple[int, int] | None = None
        """Those of the newest file that was opened."""
        self._before: Line | None = None
        self._rest = b""
        """The start of a line whose end is not written yet."""

    def look(self, paths: Sequence[Path]) -> None:
        """Opens the files that are newer than the one that is being read; ``paths`` are all, the
        newest first."""
        with suppress(FileNotFoundError):
            status = paths[0].lstat()
            if self._looked == _identity(status):
                if self._files and status.st_size < self._files[-1].tell():
                    self._files[-1].seek(0)  # truncated
                return
            self._looked = _identity(status)
        with ExitStack() as stack:
            files = opened(paths, stack)
            stack.pop_all()  # they are closed once they are read, or by close
        known = [_identity(os.fstat(file.fileno())) for file in files]
        new = known.index(self._newest) + 1 if self._newest in known else 0
        for file in files[:new]:
            file.close()
        self._files += files[new:]
        self._newest = known[-1] if known else self._newest

    def lines(self, at_end: bool) -> Iterator[Line]:
        """The lines up to the present end of the files."""
        for line in parsed(self._texts(at_end), self.rank, self._before):
            self._before = line
            yield line

    def _texts(self, at_end: bool) -> Iterator[bytes]:
        while self._files:
            text = self._files[0].readline(LONGEST)
            self._rest += text
            is_whole = text.endswith(b"\n") or len(self._rest) >= LONGEST
            ends = not text and (at_end or len(self._files) > 1)
            if self._rest and (is_whole or ends):
                text, self._rest = self._rest, b""
                yield text
            elif not text and len(self._files) > 1:
                self._files.pop(0).close()  # it was rotated
            elif not text:
                return

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
