"""Uploads what W&B still lacks of a run that has ended: the segments of offline attempts,
committed rows that no attempt has sent, and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.checkpoint.mirror import MirrorError
from train.checkpoint.store import CheckpointStore
from train.exits import RetryError, RunError, UsageError, first_line
from train.track.event_log import Event, events_until
from train.track.sinks import RunInfo
from train.track.track_config import TrackConfig
from train.track.wandb_log import (
    first_step,
    has_run,
    is_offline,
    last_value,
    mark_uploaded,
    synced_marker,
    transaction_logs,
    uploaded_value,
)
from train.track.wandb_rows import EVENT_TIME, Told, committed_steps
from train.track.wandb_sink import WandbSink, wandb_mode


def check_login() -> None:
    """Raises UsageError without credentials of W&B, and for settings that W&B's client refuses."""
    user = _setup()
    if user.mode != "online":
        raise UsageError(f"WANDB_MODE is {user.mode!r}, in which nothing is uploaded; unset it.")
    if wandb_mode("auto", user.mode, user.base_url, user.api_key) != "online":
        raise UsageError(
            f"There are no credentials for W&B ({user.base_url}); set WANDB_API_KEY, or log in "
            "with `wandb login`."
        )


def _setup() -> Any:
    """W&B's settings for this process. With its default retries, the client would take many minutes
    to give up on a server that fails. Raises UsageError for a value that it refuses."""
    import wandb
    from pydantic import ValidationError

    wanted = {"silent": True, "x_graphql_retry_max": 4, "x_graphql_retry_wait_max_seconds": 4.0}
    known = wandb.Settings.model_fields
    settings: dict[str, Any] = {name: v for name, v in wanted.items() if name in known}
    try:
        return wandb.setup(settings=wandb.Settings(**settings)).settings
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "_".join(str(part) for part in wrong["loc"])
        raise UsageError(
            f"W&B refuses its setting {name} ({wrong['msg']}); correct WANDB_{name.upper()} in the "
            "environment, or W&B's own settings file."
        ) from None


def upload(
    run: RunInfo, config: TrackConfig, say: Callable[[str], None], *, seconds: float, exit_code: int
) -> None:
    """Uploads in the order of steps; what W&B has is not sent again, so it may be repeated after
    it was interrupted.

    ``run.start_step`` is the last committed step, ``exit_code`` that of the last attempt, which W&B
    shows; ``seconds`` limits the upload of each segment and checkpoint. Raises RetryError.
    """
    logs = transaction_logs(run.directory)
    steps = committed_steps(run.directory / "metrics.jsonl")
    events = list(events_until(run.directory, run.attempt))
    nothing = True
    known = 0  # rows of later steps may be in no log
    told = Told(0, 0)  # events that the logs so far have
    doubtful = False  # W&B may lack rows of an online attempt, if it was killed
    for number, log in enumerate(logs):
        is_synced = synced_marker(log).exists()
        if is_offline(log) and not is_synced and has_run(log):
            before = (first_step(log) or 1) - 1  # without a row, nothing must be there before
            if before and (doubtful or any(known < step <= before for step in steps)):
                earlier = [event for event in events if told.has(event)]
                nothing &= not _send_rows(
                    run, config, say, exit_code, before, earlier, logs[:number]
                )
                doubtful = False
            _sync_segment(log, run.directory, seconds)
            say(f"{run.id}: uploaded {log.parent.name}.")
            nothing = False
        doubtful |= not is_offline(log) and not is_synced
        known = max(known, uploaded_value(log, "step") or 0)
        newest = (uploaded_value(log, name) or 0 for name in (EVENT_TIME, "attempt"))
        told = Told(*map(max, told, newest))
    if doubtful or known < run.start_step:
        nothing &= not _send_rows(run, config, say, exit_code, run.start_step, events, logs)
    for log in transaction_logs(run.directory):
        if not is_offline(log) and not synced_marker(log).exists():  # of this command
            mark_uploaded(log, last_value(log, "step") or 0)
    nothing &= not _send_checkpoints(run, config, say, exit_code, seconds)
    if nothing:
        what = "rows" if config.wandb_checkpoints == "none" else "rows and checkpoints"
        say(f"{run.id}: W&B has all of its {what}.")


def _send_rows(
    run: RunInfo,
    config: TrackConfig,
    say: Callable[[str], None],
    exit_code: int,
    until: int,
    events: Sequence[Event],
    logs: Sequence[Path],
) -> bool:
    """Sends the rows up to a step that W&B lacks, with those of the events that it lacks; returns
    whether there were some. Records in the online ones of ``logs`` what W&B has of them."""
    sink = WandbSink(replace(run, start_step=until), config)
    try:
        rows = sink.catch_up(exit_code, events)
    except Exception as error:
        raise RetryError(
            f"W&B cannot be reached ({first_line(error)}); run the command again to continue."
        ) from error
    for log in logs:
        if not is_offline(log):
            mark_uploaded(log, rows.sent)
    if rows.count:
        say(f"{run.id}: sent {rows.count} rows from metrics.jsonl.")
    return bool(rows.count)


def _send_checkpoints(
    run: RunInfo, config: TrackConfig, say: Callable[[str], None], exit_code: int, seconds: float
) -> bool:
    """Sends the checkpoints that ``track.wandb_checkpoints`` wants and W&B lacks; returns whether
    there were some."""
    sink = WandbSink(run, config, store=CheckpointStore(run.directory / "checkpoints"))
    try:
        _setup()
        return sink.send_checkpoints(say, exit_code, seconds=max(1, round(seconds)))
    except RunError:
        raise
    except MirrorError as error:
        raise RetryError(
            f"checkpoint.mirror.url of {run.id} cannot be read ({error}); run the command again to "
            "continue."
        ) from error
    except Exception as error:
        raise RetryError(
            f"W&B did not take the checkpoints of {run.id} ({first_line(error)}); run the command "
            "again to continue."
        ) from error


def _sync_segment(log: Path, directory: Path, seconds: float) -> None:
    """Uploads an offline segment with W&B's own command, which continues an interrupted upload.
    Raises RetryError."""
    started = time.monotonic()
    command = [sys.executable, "-m", "wandb", "sync", str(log)]
    environment = {**os.environ, "WANDB_DIR": str(directory)}  # for its own log
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace",
            timeout=seconds, check=False,
        )  # fmt: skip
        said = (done.stdout + done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"timed out after {time.monotonic() - started:.0f} s"]
    if not synced_marker(log).exists():
        why = said[-1].removeprefix("wandb: ") if said else "it gave no reason"
        raise RetryError(
            f"W&B did not take {log.relative_to(directory)} ({why}); run the command again to "
            "continue."
        )
