"""The rows of a W&B run over all attempts: each step once, in order.

W&B's history can only be appended to. After a crash, a run repeats the steps since its last commit,
of which W&B already has some: these rows stay as the earlier attempt sent them. Rows of committed
steps that W&B lacks, because they were lost with the process, are sent from metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.json_files import LARGEST, has_fields, json_lines


class Rows:
    """Collects what is logged for a step into one row, which is sent when a later step begins.

    W&B has all rows up to the step ``sent``, whose steps are not sent again. ``send`` sends a row.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], sent: int) -> None:
        self._send, self.sent = send, sent
        self._row: dict[str, Any] = {}
        self._moved = False
        """Whether the row only has an event of an earlier step."""
        self.count = 0
        """Rows that were sent."""

    def add(self, step: int, values: Mapping[str, Any], **columns: Any) -> None:
        """Adds values to the row of a step that W&B has not. ``columns`` count only for a new
        row."""
        if step <= self.sent:
            return
        if self._row and step > self._row["step"]:
            self.flush()
        if not self._row:
            self._row = {"step": step, **columns}
        self._row |= values
        self._moved = False

    def event(self, step: int, text: str, **columns: Any) -> None:
        """Adds a sentence to the column ``event`` of the row of a step, or of the first later step
        that W&B has not."""
        at = max(step, self.sent + 1, self._row.get("step", 0))
        before = self._row.get("event") if self._row.get("step") == at else None
        moved = at > step and (self._moved or at != self._row.get("step"))
        self.add(at, {"event": f"{before} {text}" if before else text}, **columns)
        self._moved = moved

    def advance(self, step: int) -> None:
        """The rows before this step are complete."""
        if self._row and self._row["step"] < step:
            self.flush()

    def discard(self, step: int) -> None:
        """Forgets the row of this step, unless it was sent."""
        if self._row.get("step") == step:
            self._row = {}

    def close(self) -> None:
        """Sends the last row, unless its step has not been reached: W&B would not take the metrics
        that a later attempt has of that step."""
        if self._moved:
            self._row = {}
        self.flush()

    def flush(self) -> None:
        """Sends the row that is being collected."""
        row, self._row = self._row, {}
        if row:
            self.sent = row["step"]
            self.count += 1
            self._send(row)


def lacking_rows(
    metrics_file: Path, until: int, sent: int, starts: dict[int, int]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """The rows of metrics.jsonl after the step ``sent`` up to a step: step, values and columns.

    ``starts`` has the attempts whose start W&B does not have, in order, with the steps that they
    resumed from. The first row of such an attempt, or of a later one, has their events; these
    attempts are removed from ``starts``.
    """
    for step, row in committed_rows(metrics_file, until):
        if step > sent:
            metrics, columns = as_logged(row)
            values: dict[str, Any] = {**metrics}
            attempt = columns.get("attempt")
            begun = [n for n in starts if type(attempt) is int and n <= attempt]
            if begun:
                values["event"] = " ".join(start_event(n, starts.pop(n)) for n in begun)
            yield step, values, columns


def start_event(attempt: int, step: int) -> str:
    """The event of an attempt that resumes from a step."""
    return f"Attempt {attempt} starts after step {step}."


def committed_rows(metrics_file: Path, until: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The steps and rows of metrics.jsonl up to a step. Other lines are left out."""
    if not metrics_file.exists():
        return
    for _, row in json_lines(metrics_file):
        if has_fields(row, {"step": int}) and row["step"] <= until:
            yield row["step"], row


def committed_steps(metrics_file: Path) -> list[int]:
    """The steps of all rows of metrics.jsonl, in order."""
    return [step for step, _ in committed_rows(metrics_file, LARGEST)]


def as_logged(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of a row of metrics.jsonl, and its other columns as W&B names them."""
    columns = {"attempt": row.get("attempt"), "_timestamp": row.get("time")}
    metrics = {
        name: float("nan") if value is None else value
        for name, value in row.items()
        if name not in ("step", "attempt", "time")
    }
    return metrics, {name: value for name, value in columns.items() if value is not None}
