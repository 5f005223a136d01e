"""attempts.jsonl: a line per attempt, which gets the attempt's end where it is known."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.files import open_regular, read_bytes, replace_bytes
from train.json_files import LIMIT, parse_object


class Attempts:
    """The attempts of a run, numbered from 1 by their lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changing = threading.Lock()  # a thread may record an end as well

    def _lines(self) -> list[bytes]:
        return read_bytes(self.path, LIMIT).splitlines() if self.path.exists() else []

    def count(self) -> int:
        """The number of attempts so far, failed ones included."""
        return len(self._lines())

    def by_number(self) -> dict[int, dict[str, Any]]:
        """What each attempt recorded; without the lines that are damaged."""
        found = {number: _parse(line) for number, line in enumerate(self._lines(), start=1)}
        return {number: values for number, values in found.items() if values}

    def last(self) -> dict[str, Any]:
        """What the last attempt recorded; {} without one, or if it cannot be read, for instance
        because a crash cut off its line."""
        try:
            lines = self._lines()
        except OSError:
            return {}
        return _parse(lines[-1]) if lines else {}

    def record(self, values: Mapping[str, Any]) -> None:
        """Appends a line for this attempt, durably."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        with os.fdopen(open_regular(self.path, flags), "a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut off the last line
                    file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def record_end(self, number: int, code: int, reason: str) -> None:
        """Adds ``ended`` to the line of an attempt, atomically: time, exit code and reason."""
        with self._changing:
            lines = self._lines()
            values = _parse(lines[number - 1]) if number <= len(lines) else {}
            if values.get("attempt") != number:
                return
            values["ended"] = {"time": time.time(), "code": int(code), "reason": reason}
            lines[number - 1] = json.dumps(values).encode()
            replace_bytes(self.path, b"".join(line + b"\n" for line in lines))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line)
    except ValueError:
        return {}
