"""The MLflow sink, of the extra ``mlflow``. It uses only what docs/extending.md promises to sinks.

track:
  sinks: [train.track.mlflow_sink:MlflowSink]
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import time
import warnings
from collections import deque
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from train.exits import Exit, RunError
from train.track.mlflow_run import MlflowRun, experiment_id, user_name
from train.track.sinks import Sink

_log = logging.getLogger(__name__)

_EVERY = 2.0  # seconds between requests
_ENOUGH = 50  # rows that are sent at once
_ROWS = 5000
"""How many rows wait in memory; the others are read from metrics.jsonl."""
_FILE_BYTES = 64 << 20
"""Bytes of artifacts that wait in memory; the oldest are left out."""
_EVENTS_FOLDER = "events"
_EVENTS = 200_000
"""Characters of the events of an attempt."""
_TRIES = 3
"""How often an artifact is sent before it is left out."""
_CLOSE = 12.0  # seconds; less than the tracker waits for a sink
_STATUS = {Exit.DONE: "FINISHED", Exit.PREEMPTED: "KILLED", Exit.STOPPED_AT_ONCE: "KILLED"}


class MlflowSink(Sink):
    """One MLflow run for all attempts, with each step once.

    A server that does not answer is tried again, with growing pauses; there is one warning. Rows
    that do not fit into memory meanwhile, or that were lost with a process, are sent from
    metrics.jsonl. MLflow has no histograms.
    """

    name = "MLflow"
    defaults: ClassVar = {
        # By default a request waits for minutes, and is repeated, also if the server has done it.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        # By default MLflow prints its messages, and reports to its developers.
        "MLFLOW_CONFIGURE_LOGGING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow 3 refuses stores in files by default.
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    """Environment variables that are set where they are not."""

    def __init__(
        self,
        run: Any,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """The options of the sink.

        ``tracking_uri``: a server or store; by default MLFLOW_TRACKING_URI, else files in
        the run directory. ``experiment``: by default MLFLOW_EXPERIMENT_NAME, else "isorun".
        ``run_name``: by default the run's. ``tags``: further tags. Raises RunError.
        """
        super().__init__(run)
        for name, value in {
            "tracking_uri": tracking_uri, "experiment": experiment, "run_name": run_name,
        }.items():  # fmt: skip
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise _usage(f"its option {name} is {value!r}; set a text")
        if tags is not None and not isinstance(tags, Mapping):
            raise _usage(f"its option tags is {tags!r}; set a mapping of names to texts")
        if find_spec("mlflow") is None:
            raise _usage("MLflow is not installed; install it with `pip install 'isorun[mlflow]'`")
        self._folder: Path = run.directory / "mlflow"
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "isorun"
        self._run_name = run_name or run.name
        self._tags: dict[str, Any] = dict(tags or {})
        self._mlflow: MlflowRun | None = None
        self._rows: deque[tuple[int, float, dict[str, float]]] = deque()
        self._files: deque[tuple[str, Any]] = deque()
        self._tries = 0
        self._events: list[str] = []
        self._has_new_events = False
        self._last = run.start_step
        self._due = 0.0
        self._pause = 2.5
        self._until = float("inf")
        self._warned = False
        self._status = "KILLED"

    def load(self) -> None:
        """Imports MLflow."""
        for name, value in self.defaults.items():
            os.environ.setdefault(name, value)
        import mlflow.tracking  # noqa: F401

        warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)\b")
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a line per table of the database

    def open(self) -> str | None:
        """Chooses the store; the first rows connect to it."""
        from mlflow.tracking import MlflowClient

        if self._folder.is_symlink():
            raise OSError(f"{self._folder} is a symbolic link, not a directory")
        self._folder.mkdir(exist_ok=True)
        message = None
        if self._uri is None:
            # Not a database: a new one takes seconds of this process, is damaged for good if the
            # process is killed meanwhile, and needs locks that shared file systems may not have.
            store = self._folder.absolute() / "store"
            self._uri = store.as_uri()
            message = (
                "MLflow logs to files. To look at them: MLFLOW_ALLOW_FILE_STORE=true "
                f"mlflow ui --backend-store-uri {shlex.quote(str(store))}"
            )
        self._client = MlflowClient(tracking_uri=self._uri)
        code, facts = self.run.code, self.run.facts
        self._add_file("config.json", json.dumps(self.run.config, indent=1))
        if summary := facts.get("model_summary"):
            self._add_file("model.txt", str(summary))
        self._tags = {
            **{k: v for k, v in self.run.parameters().items() if k.startswith(_DESCRIBED)},
            "isorun.attempt": self.run.attempt,
            "mlflow.source.name": "isorun",
            "mlflow.user": user_name(),
            **({"mlflow.source.git.commit": code["commit"]} if code.get("commit") else {}),
            **self._tags,
        }
        return message

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row, which is sent with the next ones."""
        self._add_row(step, {**metrics, "attempt": float(self.run.attempt)})

    def _add_row(self, step: int, metrics: dict[str, float]) -> None:
        self._last = max(self._last, step)
        self._rows.append((step, self.logged_at or time.time(), metrics))
        if len(self._rows) > _ROWS:
            self._rows.popleft()
            self._mlflow = None  # a new connection sends it from metrics.jsonl
        if len(self._rows) % _ENOUGH == 0:
            self._send()

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Adds texts and images as artifacts of a step."""
        for name, item in items.items():
            path = f"samples/step-{step:08d}/{_file_name(name)}"
            if isinstance(item, str):
                self._add_file(f"{path}.txt", item)
            else:
                self._add_file(f"{path}.png", item.transpose(1, 2, 0))

    def _add_file(self, path: str, content: Any) -> None:
        self._files.append((path, content))
        while len(self._files) > 1 and sum(_size(item) for _, item in self._files) > _FILE_BYTES:
            self._leave_out("MLflow is too slow")

    def event(self, step: int, text: str) -> None:
        """Adds a line to the artifact with the events of this attempt."""
        self._events.append(_line(step, text))
        self._has_new_events = True

    def advance(self, step: int) -> None:
        """Sends what there is, at most every two seconds."""
        if time.monotonic() >= self._due:
            self._send()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Adds the final metrics, at the last step."""
        numbers = {n: float(v) for n, v in values.items() if isinstance(v, int | float)}
        self._add_row(self._last, self.summary_names(numbers))

    def end(self, code: int) -> None:
        """The status of the MLflow run follows from the exit code."""
        self._status = _STATUS.get(Exit(code), "FAILED") if code in set(Exit) else "FAILED"

    def close(self) -> None:
        """Sends the rest, and ends the MLflow run until the next attempt."""
        self._due, self._until = 0.0, time.monotonic() + _CLOSE
        if self._send() and self._mlflow:
            try:
                self._in_time()
                self._mlflow.end(self._status)
            except Exception as error:
                self._failed(error)

    def _send(self) -> bool:
        """Sends what waits, unless the server failed a short time ago; whether it was sent."""
        if time.monotonic() < self._due:
            return False
        try:
            self._in_time()
            mlflow = self._mlflow or self._connect()
            for _ in mlflow.send(iter(self._rows)):
                self._in_time()
            self._rows.clear()
            if self._has_new_events:
                self._in_time()
                mlflow.add_file(_events_path(self.run.attempt), _newest(self._events))
                self._has_new_events = False
            while self._files:
                self._in_time()
                self._tries += 1
                mlflow.add_file(*self._files[0])
                self._files.popleft()
                self._tries = 0
        except Exception as error:
            self._failed(error)
            return False
        self._due, self._pause = time.monotonic() + _EVERY, 2.5
        return True

    def _connect(self) -> MlflowRun:
        """Finds the MLflow run, describes it, and sends the rows before those in memory."""
        experiment = experiment_id(self._client, self._experiment)
        run = MlflowRun(
            self._client, self._folder / "run.json", experiment, self.run.id, self._run_name
        )
        self._in_time()
        run.describe(self.run.parameters(), self._tags)
        self._send_earlier_events(run)
        until = max(self.run.start_step, self._rows[0][0] - 1 if self._rows else self._last)
        earlier = (
            (row.step, row.time or 0.0, {**row.metrics, "attempt": float(row.attempt or 1)})
            for row in self.run.rows(until=until)
        )
        for _ in run.send(earlier):
            self._in_time()
        self._mlflow = run
        return run

    def _send_earlier_events(self, run: MlflowRun) -> None:
        """Sends what earlier attempts have not sent of their events, as they were killed."""
        lines: dict[str, list[str]] = {}
        for event in self.run.events():
            lines.setdefault(_events_path(event.attempt), []).append(_line(event.step, event.text))
        sizes = run.file_sizes(_EVENTS_FOLDER) if lines else {}
        for path, texts in lines.items():
            text = _newest(texts)
            if sizes.get(path) != len(text.encode()):
                self._in_time()
                run.add_file(path, text)

    def _in_time(self) -> None:
        if time.monotonic() > self._until:
            raise TimeoutError(f"no time was left {_CLOSE:g} s after the end of the run")

    def _failed(self, error: Exception) -> None:
        """Warns once, and lets the next connection begin after a pause, with what MLflow has."""
        self._mlflow = None
        self._pause = min(60.0, 2 * self._pause)
        self._due = time.monotonic() + self._pause
        if self._files and self._tries >= _TRIES:
            self._leave_out(f"{type(error).__name__}")
        if self._warned:
            _log.info("MLflow failed again", exc_info=True)
        else:
            self._warned = True
            _log.info("MLflow failed", exc_info=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning(
                "MLflow cannot be written (%s); training continues, and it is tried again. The "
                "next attempt sends the metrics that MLflow lacks.", reason[:300],
            )  # fmt: skip

    def _leave_out(self, reason: str) -> None:
        path, _ = self._files.popleft()
        self._tries = 0
        _log.info("the artifact %s is not sent to MLflow: %s", path, reason)


_DESCRIBED = ("code.", "placement.", "dataset.")
"""Parameters that are tags as well, with the values of the last attempt."""


def _usage(text: str) -> RunError:
    error = RunError(text + ".")
    error.code = Exit.USAGE
    return error


def _events_path(attempt: int) -> str:
    return f"{_EVENTS_FOLDER}/attempt-{attempt:04d}.txt"


def _line(step: int, text: str) -> str:
    return f"step {step}: {text}\n"


def _newest(lines: list[str]) -> str:
    """The lines, without the first ones of too many; removes these from the list."""
    while len(lines) > 1 and sum(map(len, lines)) > _EVENTS:
        del lines[0]
    return "".join(lines)


def _size(content: Any) -> int:
    return len(content) if isinstance(content, str) else int(content.nbytes)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w\-]+", "_", name)[:100] or "_"
