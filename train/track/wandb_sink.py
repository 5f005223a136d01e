"""The Weights & Biases sink."""

from __future__ import annotations

import atexit
import html
import importlib
import logging
import netrc
import os
import pkgutil
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train.checkpoint.store import CheckpointStore
from train.code.changes import CODE
from train.exits import first_line
from train.files import read_bytes, refuse_link
from train.secrets import redact_command, redact_values
from train.track.event_log import Event, milliseconds
from train.track.sinks import RunInfo, Sink
from train.track.track_config import TrackConfig
from train.track.wandb_checkpoints import CheckpointSender, send_missing
from train.track.wandb_inputs import RunInputs
from train.track.wandb_log import (
    is_offline,
    mark_uploaded,
    remove_unrecorded,
    synced_marker,
    transaction_logs,
    uploaded_value,
)
from train.track.wandb_rows import EVENT_TIME, Rows, Told, continued_rows
from train.track.wandb_shared import NO_SHARED_MODE, has_shared_mode, node_label
from train.track.wandb_traces import RunTraces
from train.track.wandb_uploads import CheckpointUploads

_log = logging.getLogger("train")
# Together less than the tracker waits for its sinks.
_FINISH_SECONDS = 15.0
_UPLOAD_SECONDS = 8.0
_INPUT_SECONDS = 4.0


class WandbSink(Sink):
    """Logs to W&B with its own ``step`` axis, under one W&B id for all attempts. With the
    ``store`` of the run's checkpoints, also sends these."""

    name = "W&B"

    def __init__(
        self,
        run: RunInfo,
        config: TrackConfig,
        *,
        init_seconds: float = 20.0,
        store: CheckpointStore | None = None,
    ) -> None:
        self.run, self.config, self.init_seconds = run, config, init_seconds
        self._store = None if config.wandb_checkpoints == "none" else store
        self._uploads: CheckpointUploads | None = None
        self._inputs: RunInputs | None = None
        self._exit_code = 0
        self._rows: Rows | None = None
        self._traces: RunTraces | None = None
        self._hooks = sys.exit, sys.excepthook

    def load(self) -> None:
        """Imports wandb, with defaults that keep its files in the run directory."""
        cache = str(self.run.directory / "wandb" / "cache")
        defaults = {
            # By default artifacts are staged in the home directory and never removed.
            "WANDB_DATA_DIR": cache,
            "WANDB_CACHE_DIR": cache,
            "WANDB_ARTIFACT_DIR": cache,
            # By default a process without a working network hangs at exit, to report errors.
            "WANDB_ERROR_REPORTING": "false",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        import wandb  # noqa: F401

        if self._store is not None:
            _load_artifacts()

    def open(self) -> str | None:
        """Starts or resumes the W&B run; offline if W&B cannot be reached."""
        self._hooks = sys.exit, sys.excepthook  # wandb replaces both
        try:
            return self._open()
        finally:
            sys.exit, sys.excepthook = self._hooks

    def _open(self) -> str | None:
        import wandb

        self._refuse_links()
        # Before the first call of init, which otherwise prints the credentials that it found.
        user = wandb.setup(settings=wandb.Settings(silent=True)).settings
        mode = wandb_mode(self.config.wandb, user.mode, user.base_url, user.api_key)
        message = None
        remove_unrecorded(self.run.directory)
        logs = transaction_logs(self.run.directory)  # of earlier attempts
        if mode == "online" and self.config.wandb_nodes:
            if has_shared_mode():
                mode = "shared"
            else:
                message = f"track.wandb_nodes has no effect: {NO_SHARED_MODE}."
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode not in ("online", "shared"):
                raise
            wandb.teardown()  # its service still holds the run id
            wandb.setup(settings=wandb.Settings(silent=True))
            message = f"W&B cannot be reached ({first_line(error)}); logging offline."
            mode = "offline"
            self._run = self._init(mode)
        self._define_metrics()
        if mode != "disabled":
            self._continue_rows(mode, logs)
            self._add_code()
            self._traces = RunTraces(self.run)
        if mode in ("online", "shared") and self.run.inputs:
            self._inputs = RunInputs(self._run, self.run.inputs)
        if mode in ("online", "shared") and self._store is not None:
            self._uploads = CheckpointUploads(self._sender(self._store))
            self._uploads.start(self._run)
        if mode == "offline":
            command = f"isorun sync {shlex.quote(str(self.run.directory))}"
            nodes = " track.wandb_nodes has no effect offline." if self.config.wandb_nodes else ""
            message = f"{message or 'W&B is offline.'}{nodes} To upload: {command}"
        return message

    def catch_up(self, exit_code: int, events: Iterable[Event]) -> Rows:
        """Sends the committed rows that W&B lacks, with those of ``events`` that it lacks, and
        nothing else. Raises an exception of W&B if it cannot be reached."""
        self._refuse_links()
        self.load()
        self._run = self._init("online")
        try:
            self._define_metrics()
            rows = self._begin_rows("online", [], events)
            rows.close(self.run.start_step, attempt=self.run.attempt)
            return rows
        finally:
            self._exit_code = exit_code
            self.close()

    def send_checkpoints(self, say: Callable[[str], None], exit_code: int, *, seconds: int) -> bool:
        """Sends the checkpoints that W&B lacks, as ``send_missing`` does; returns whether there was
        something to send. Raises an exception of W&B if it cannot be reached, or OSError."""
        if self._store is None:
            return False
        sender = self._sender(self._store)
        if not (sender.lacks_dataset or sender.missing(ended=True) or sender.stale()):
            return False
        self._refuse_links()
        self.load()
        self._run = self._init("online")
        try:
            send_missing(sender, self._run, say, seconds=seconds)
        finally:
            self._exit_code = exit_code
            self.close()
        return True

    def _sender(self, store: CheckpointStore) -> CheckpointSender:
        return CheckpointSender(self.run, store, self.config.wandb_checkpoints)

    def _refuse_links(self) -> None:
        for name in ("wandb", "wandb/cache"):
            refuse_link(self.run.directory / name)

    def _define_metrics(self) -> None:
        self._run.define_metric("step", hidden=True)
        self._run.define_metric(EVENT_TIME, hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _last(self, mode: str, logs: Sequence[Path], name: str) -> int:
        """The largest value of a column that cannot decrease, of the rows that W&B has."""
        if mode != "offline":
            value = self._run.summary.get(name) if self._run.resumed else None
            if isinstance(value, (int, float)):
                return int(value)
            # In shared mode, another node may have written the summary last.
            if not (self._run.resumed and mode == "shared"):
                return 0
        return max((uploaded_value(log, name) or 0 for log in logs), default=0)

    def _add_code(self) -> None:
        """Adds the changes of the code as a file of the W&B run, where it stays with the run, also
        offline: an artifact would be a thing of the project."""
        if path := self.run.changes():
            copy = Path(self._run.dir) / CODE / path.name  # W&B links files elsewhere
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(read_bytes(path))
            self._run.save(copy, base_path=self._run.dir, policy="now")

    def _continue_rows(self, mode: str, logs: Sequence[Path]) -> None:
        """Lets the rows of this attempt follow those of earlier ones, of which ``logs`` are."""
        for log in logs:
            # Its rows follow from metrics.jsonl, before later ones. W&B can only append.
            if mode != "offline" and is_offline(log) and not synced_marker(log).exists():
                mark_uploaded(log, max(self._last(mode, logs, "step"), self.run.start_step))
        self._begin_rows(mode, logs, self.run.events())

    def _begin_rows(self, mode: str, logs: Sequence[Path], events: Iterable[Event]) -> Rows:
        """Sends the committed rows that W&B lacks, with those of the events that it lacks."""
        sent, time, attempt = (
            self._last(mode, logs, name) for name in ("step", EVENT_TIME, "attempt")
        )
        self._rows = continued_rows(
            self._run.log, self.run.directory / "metrics.jsonl", self.run.start_step, sent,
            Told(time, attempt), events,
        )  # fmt: skip
        return self._rows

    def _init(self, mode: str) -> Any:
        import wandb

        shared = {"x_label": node_label(0), "x_primary": True} if mode == "shared" else {}
        with redacted_arguments():
            return wandb.init(
                **self._place(),
                resume="allow",
                name=self.run.name,
                group=os.environ.get("WANDB_RUN_GROUP") or self.config.wandb_group or self.run.id,
                job_type=self.config.wandb_job_type,
                tags=self.config.wandb_tags or None,
                notes=self.config.wandb_notes,
                config=redact_values({**self.run.config, "code": self.run.code, **self.run.facts}),
                dir=str(self.run.directory),
                mode=mode,  # type: ignore[arg-type]
                settings=self._settings(**shared),
            )

    def _place(self) -> dict[str, Any]:
        """Which W&B run it is."""
        return {
            "id": self.run.wandb_id,
            "project": os.environ.get("WANDB_PROJECT") or self.config.wandb_project,
            "entity": self.config.wandb_entity,
        }

    def _settings(self, **more: Any) -> Any:
        """The settings that the installed version of wandb knows."""
        import wandb

        wanted = {
            "console": "off",
            "silent": True,
            "init_timeout": self.init_seconds,
            "finish_timeout": self._finish_seconds,
            "reinit": "finish_previous",
            "sagemaker_disable": True,  # otherwise the id comes from the SageMaker job
            # By default rows are buffered for 15 s, and lost if the process is killed.
            "x_transaction_log_flush_interval": 1.0,
            **more,
        }
        known = type(wandb.Settings()).model_fields
        return wandb.Settings(**{k: v for k, v in wanted.items() if k in known})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds scalars to the row of a step, with ``step`` as a column; W&B's own step is not
        used."""
        self._add(step, metrics)

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Adds texts (as preformatted HTML) and images to the row of a step."""
        import wandb

        row: dict[str, Any] = {}
        for name, item in items.items():
            if isinstance(item, str):
                row[name] = wandb.Html(f"<pre>{html.escape(item)}</pre>")
            else:
                row[name] = wandb.Image(item.transpose(1, 2, 0))
        self._add(step, row)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one histogram per array to the row of a step."""
        import wandb

        self._add(step, {name: wandb.Histogram(value) for name, value in values.items()})

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        if self._rows:
            self._rows.add(step, values, **self._columns())

    def _columns(self) -> dict[str, Any]:
        # Without the time, W&B takes that of the call, which is later.
        time = {"_timestamp": self.logged_at} if self.logged_at else {}
        return {"attempt": self.run.attempt, **time}

    def event(self, step: int, text: str) -> None:
        """Adds the text to the column ``event`` of the step; with ``track.wandb_alerts`` also sends
        it as an alert of W&B."""
        if self._rows:
            time = milliseconds(self.logged_at)
            self._rows.event(Event(self.run.attempt, step, time, text), **self._columns())
        if self.config.wandb_alerts:
            self._run.alert(title=f"{self.run.name}, step {step}", text=text)

    def checkpoint(self, step: int) -> None:
        """Has the checkpoint sent, if the config wants it."""
        if self._rows:
            self._rows.committed = max(step, self._rows.committed)
        if self._uploads:
            self._uploads.wake()

    def trace(self, step: int, path: Path) -> None:
        """Sends the traces that are new."""
        if self._traces:
            self._traces.send(self._run)

    def advance(self, step: int) -> None:
        """Sends the row of an earlier step."""
        if self._rows:
            self._rows.advance(step)

    def interrupted(self, step: int) -> None:
        """Keeps the row of the step for the next attempt, since W&B's history can only be appended
        to."""
        if self._rows:
            self._rows.discard(step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Updates the summary of the W&B run, which is complete."""
        if self._uploads:
            self._uploads.finished = True
        self._run.summary.update(self.summary_names(values))

    def fail(self, code: int) -> None:
        """Lets ``close`` report the exit code, with which W&B shows the run as failed."""
        self._exit_code = code

    def close(self) -> None:
        """Finishes this attempt; a later attempt can resume the W&B run."""
        import wandb

        if self._rows and (left := self._rows.close()):
            self._run.summary["event"] = left  # until the next attempt sends a row
        if self._traces:
            self._traces.send(self._run)  # those of other ranks
        if self._inputs:
            self._inputs.wait(_INPUT_SECONDS)
        if self._uploads:
            self._uploads.close(_UPLOAD_SECONDS)
        # W&B's own limit does not hold while the server takes no more of an artifact's file.
        finish = threading.Thread(target=self._finish, daemon=True)
        finish.start()
        finish.join(self._finish_seconds + 1.0)
        if self._uploads:
            self._uploads.abandon(1.0)
        if finish.is_alive():
            self.abandon()
        else:
            wandb.teardown()  # now, within the tracker's timeout, instead of at exit

    @property
    def _finish_seconds(self) -> float:
        return _FINISH_SECONDS - (_UPLOAD_SECONDS if self._store else 0.0)

    def _finish(self) -> None:
        try:
            self._run.finish(exit_code=self._exit_code)
        except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
            _log.warning("W&B did not finish the run: %s", first_line(error))

    def abandon(self) -> None:
        """Unregisters wandb's atexit hook, which could block the process exit without limit, and
        its other hooks, which ``open`` leaves if it does not end."""
        sys.exit, sys.excepthook = self._hooks
        if self._uploads:
            self._uploads.abandon()
        atexit.unregister(_ServiceHook())  # type: ignore[arg-type]


def _load_artifacts() -> None:
    """Imports what wandb otherwise imports when it sends an artifact. In that thread, it could be
    while a data worker is forked (see ``Background``)."""
    for name in (
        "apis.public", "apis._generated", "sdk.artifacts.artifact", "sdk.artifacts._generated",
        "sdk.artifacts._gqlutils", "sdk.artifacts._validators", "sdk.artifacts.staging",
        "sdk.artifacts._internal_artifact", "sdk.artifacts.artifact_manifest_entry",
        "sdk.internal._generated",
    ):  # fmt: skip
        with suppress(ImportError):  # another version
            module = importlib.import_module(f"wandb.{name}")
            if name.endswith("._generated"):  # each query is a module
                for query in pkgutil.iter_modules(module.__path__, f"wandb.{name}."):
                    importlib.import_module(query.name)


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Hides secrets in the arguments of this process, which W&B records."""
    before = sys.argv
    redacted = redact_command(before)
    if redacted != before:
        sys.argv = redacted
    try:
        yield
    finally:
        sys.argv = before


class _ServiceHook:
    """Compares equal to the atexit hook of wandb's service connection."""

    def __eq__(self, other: object) -> bool:
        # None for built-in functions, of which torch registers some.
        return (getattr(other, "__module__", None) or "").startswith("wandb.sdk.lib.service")

    __hash__ = object.__hash__


def wandb_mode(wanted: str, mode: str, base_url: str, api_key: str | None) -> str:
    """Resolves ``track.wandb`` (``wanted``) to online, offline or disabled.

    "auto" follows WANDB_MODE or W&B's settings (``mode``; its default is "online"), but is online
    only with credentials: in the environment, in W&B's settings (``api_key``), or in netrc.
    """
    if wanted != "auto":
        return wanted
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return "disabled"
    variables = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if api_key or any(os.environ.get(name) for name in variables):
        return "online"
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = netrc.netrc(path).authenticators(urlsplit(base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"
