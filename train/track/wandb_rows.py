"""The rows of a W&B run over all attempts: each step once, in order, and each event once.

W&B's history can only be appended to. After a crash, a run repeats the steps since its last commit,
of which W&B already has some: these rows stay as the earlier attempt sent them. Rows of committed
steps that W&B lacks, because they were lost with the process, are sent from metrics.jsonl. What
happened at a step that W&B has, or was lost with a row, is in the next row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from train.json_files import LARGEST, has_fields, json_lines
from train.track.event_log import Event

EVENT_TIME = "event_time"
"""The column with the time of the last event that W&B has, in each row after the first event."""


class Told(NamedTuple):
    """What W&B has of the events: those up to a time, and the starts of attempts that have rows."""

    time: int
    attempt: int

    def has(self, event: Event) -> bool:
        """Whether W&B has the event."""
        if event.time is None:
            return event.attempt <= self.attempt
        return event.time <= self.time


class Rows:
    """Collects what is logged for a step into one row, which is sent when a later step begins.

    W&B has all rows up to the step ``sent``, whose steps are not sent again, and all events up to
    the time ``told``. ``events`` are those of earlier attempts that it lacks, in order. ``send``
    sends a row.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        sent: int,
        told: int = 0,
        events: Iterable[Event] = (),
    ) -> None:
        self._send, self.sent, self._told = send, sent, told
        self._row: dict[str, Any] = {}
        self._events = list(events)
        """What no row has yet."""
        self._has_metrics = False
        """Whether the row has more than events."""
        self.count = 0
        """Rows that were sent."""
        self.committed = sent
        """The last committed step, after which the next attempt logs its own metrics."""

    def add(self, step: int, values: Mapping[str, Any], **columns: Any) -> None:
        """Adds values to the row of a step that W&B has not. ``columns`` count only for a new
        row."""
        if step > self.sent:
            self._begin(step, columns)
            self._row |= values
            self._has_metrics = True

    def _begin(self, step: int, columns: Mapping[str, Any]) -> None:
        if self._row and step > self._row["step"]:
            self.flush()
        if not self._row:
            self._row, self._has_metrics = {"step": step, **columns}, False

    def event(self, event: Event, **columns: Any) -> None:
        """Adds a sentence to the column ``event`` of the row of its step, or of the next row that
        is sent if W&B has that step."""
        if event.step > self.sent:
            self._begin(event.step, columns)
        self._events.append(event)

    def advance(self, step: int) -> None:
        """The rows before this step are complete."""
        if self._row and self._row["step"] < step:
            self.flush()

    def discard(self, step: int) -> None:
        """Forgets the row of this step, unless it was sent."""
        if self._row.get("step") == step:
            self._row = {}

    def close(self, last: int = 0, **columns: Any) -> str:
        """Sends the last row, unless it only has events of a step of which the next attempt logs
        the metrics. Returns the events that no row has, which the next attempt sends.

        If no attempt logs the steps up to ``last`` any more, the last row has all events; if there
        is none, it is that of the step ``last``, with ``columns``.
        """
        if last and self._events and last > self.sent:
            self._begin(last, columns)
        if not self._has_metrics and self._row.get("step", 0) > self.committed:
            self._row = {}
        self.flush(has_all=bool(last))
        return " ".join(event.text for event in self._events)

    def flush(self, *, has_all: bool = False) -> None:
        """Sends the row that is being collected, with the events up to it, or all of them."""
        row, self._row = self._row, {}
        if not row:
            return
        # A start without a time is known as sent by the rows of its attempt.
        events = list(
            takewhile(
                lambda event: _is_up_to(event, row) or (has_all and event.time is not None),
                self._events,
            )
        )
        del self._events[: len(events)]
        if events:
            row["event"] = " ".join(event.text for event in events)
            self._told = max(self._told, *(event.time or 0 for event in events))
        if self._told:
            row[EVENT_TIME] = self._told
        self.sent = row["step"]
        self.count += 1
        self._send(row)


def _is_up_to(event: Event, row: Mapping[str, Any]) -> bool:
    """Whether an event was before the row was logged. An earlier attempt may have reached a later
    step than that from which the next one resumed."""
    attempt = row.get("attempt")
    if type(attempt) is not int or event.attempt == attempt:
        return event.step <= int(row["step"])
    return event.attempt < attempt


def continued_rows(
    send: Callable[[dict[str, Any]], None],
    metrics_file: Path,
    until: int,
    sent: int,
    told: Told,
    events: Iterable[Event],
) -> Rows:
    """The rows of a run of which W&B has those up to the step ``sent``, and the events ``told``.

    Sends the rows of metrics.jsonl after it up to the step ``until``, with those of ``events``, of
    the attempts so far, that W&B lacks. The last one may still get metrics: those of an evaluation
    that the attempt before has not completed.
    """
    rows = Rows(send, sent, told.time, (event for event in events if not told.has(event)))
    rows.committed = until
    for step, row in committed_rows(metrics_file, until):
        metrics, columns = as_logged(row)
        rows.add(step, metrics, **columns)
    return rows


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
