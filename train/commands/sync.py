"""Upload to Weights & Biases what it still lacks of runs.

Takes run directories, or directories that hold them. Uploads the rows, texts and images of offline
attempts in order, rows of committed steps that were lost when an attempt was killed, and the
checkpoints that track.wandb_checkpoints wants; what W&B has is not sent again. Repeat the command
after an interruption. Running runs are left out.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.command_line import say
from train.exits import DataError, Exit, ResumeRefusedError, UsageError
from train.json_files import is_count
from train.runs.find import find_runs
from train.track.sinks import RunInfo, dataset_facts
from train.track.track_config import TrackConfig
from train.track.wandb_rows import committed_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or one "
                        "that holds run directories")  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS",
        help="for the upload of an offline attempt or a checkpoint (default 600)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints", choices=["none", "reference", "best", "all"],
        help="which checkpoints to send, instead of the run's track.wandb_checkpoints",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Exit:
    """Uploads one run after another; prints a line per step taken."""
    from train.track.wandb_sync import check_login

    if arguments.timeout <= 0:
        raise UsageError(f"--timeout must be above 0, but is {arguments.timeout:g}.")
    found = {path: _runs_in(path) for path in arguments.runs}
    check_login()
    for given, directories in found.items():
        for directory in directories:
            _upload(
                RunDirectory(directory), arguments.timeout, arguments.checkpoints,
                skips=directory != given,
            )  # fmt: skip
    return Exit.DONE


def _runs_in(path: Path) -> list[Path]:
    below = find_runs([path]) if path.is_dir() else []
    found = [directory for directory in below if RunDirectory(directory).exists]
    if not found:
        raise UsageError(
            f"{str(path)!r} is not a run directory and holds none; name the directory of a run."
        )
    return found


def _upload(
    directory: RunDirectory, seconds: float, checkpoints: str | None, *, skips: bool
) -> None:
    """With ``skips``, a run that cannot be uploaded now is left out with a line."""
    from train.track.wandb_sync import upload

    try:
        directory.acquire()
    except ResumeRefusedError as error:
        if not skips:
            raise
        say(f"{directory.path}: left out: {error}")
        return
    try:
        track = _track_config(directory)
        if checkpoints:
            track = track.model_copy(update={"wandb_checkpoints": checkpoints})
        if track.wandb == "disabled":
            say(f"{directory.path}: left out: the run has track.wandb=disabled.")
            return
        last = directory.attempts.last()
        upload(
            _run_info(directory, last), track, say, seconds=seconds,
            exit_code=_exit_code(last),
        )  # fmt: skip
    finally:
        directory.release()


def _exit_code(last: dict[str, Any]) -> int:
    """The exit code of the last attempt for W&B, where every other than 0 is a failure."""
    ended = last.get("ended")
    code = ended.get("code") if isinstance(ended, dict) else Exit.RETRY  # it was killed
    return 0 if code == Exit.PREEMPTED or type(code) is not int else code


def _track_config(directory: RunDirectory) -> TrackConfig:
    values = (directory.stored_config() or {}).get("track")
    try:
        return TrackConfig.model_validate(values or {})
    except ValidationError as error:
        raise DataError(
            f"{directory.config_path} has a track section that this version cannot read "
            f"({error.errors()[0]['msg']}); correct it."
        ) from None


def _run_info(directory: RunDirectory, last: dict[str, Any]) -> RunInfo:
    identity = directory.identity("")
    return RunInfo(
        id=identity.id,
        name=identity.name,
        directory=directory.path,
        attempt=directory.attempts.count(),
        wandb_id=identity.wandb_id,
        config=directory.stored_config() or {},
        code=last.get("code") or {},
        unit="",
        total_steps=0,
        start_step=max(committed_steps(directory.metrics), default=0),
        facts=_facts(directory),
    )


def _facts(directory: RunDirectory) -> dict[str, Any]:
    """The dataset, of which a checkpoint has the fingerprint."""
    store = CheckpointStore(directory.checkpoints)
    for step in reversed(store.steps()):
        with suppress(DamagedError):
            state = Manifest.read(store.path(step)).state
            if is_count(state.get("samples")) and state.get("data") is not None:
                return {"dataset": dataset_facts(state["samples"], state["data"])}
    return {}
