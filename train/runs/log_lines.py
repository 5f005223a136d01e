"""The lines of a rank's log file: their time, level and attempt.

train.track.logs writes ``TIME LEVEL attempt N rank N NAME: TEXT``. A line of another form, such as
those of a traceback, belongs to the line before it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

LONGEST = 1 << 20
"""Bytes after which a line is cut in two."""
_HEAD = re.compile(
    rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (Level \d+|\S+) attempt (\d{1,9}) rank \d+ "
)


class Line(NamedTuple):
    """A line of a log file, with the time, level and attempt of the message that it is part of."""

    rank: int
    time: str
    """Local time of the rank's machine, so that texts sort by time; empty before the first message
    of a file."""
    level: int
    attempt: int
    text: bytes

    @property
    def order(self) -> tuple[str, int]:
        """The lines of all ranks are merged by this."""
        return self.time, self.rank


@dataclass(frozen=True)
class Selection:
    """Which lines to print. None for all."""

    attempt: int | None = None
    level: int | None = None

    def takes(self, line: Line) -> bool:
        """Whether a line is selected."""
        return (self.attempt is None or line.attempt == self.attempt) and (
            self.level is None or line.level >= self.level
        )


def parsed(lines: Iterable[bytes], rank: int, before: Line | None = None) -> Iterator[Line]:
    """The lines of a rank, without their ends; ``before`` is the line before the first."""
    line = before or Line(rank, "", logging.NOTSET, 0, b"")
    levels = logging.getLevelNamesMapping()
    for whole in lines:
        text = whole.rstrip(b"\r\n")
        if head := _HEAD.match(text):
            name = head[2].decode(errors="replace")
            number = name.removeprefix("Level ")
            level = int(number) if number.isdecimal() else levels.get(name, logging.NOTSET)
            line = Line(rank, head[1].decode(), level, int(head[3]), text)
        else:
            line = line._replace(text=text)
        yield line
