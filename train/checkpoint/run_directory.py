"""The run directory: the run's identity, its lock, its attempts and its other files.

run.json        the run's identity; written once, at the first start
config.json     the current config
attempts.jsonl  a line per attempt; see train.checkpoint.attempts
checkpoints/    see train.checkpoint.store
ledger.bin      samples used by each step; see train.data.ledger
metrics.jsonl   all metrics
events.jsonl    what happened, over all attempts; see train.track.event_log
goodput.jsonl   where the time of each attempt went; see train.goodput.ledger
micro_batches.json  micro-batch sizes that fit; see train.setup.batch_size_finder
init_from/      a copy from a mirror or W&B, until its weights are loaded; see train.setup.init_from
restore/        a checkpoint from W&B, until it is in checkpoints/
logs/           a log file per rank
code/           changes of the code since its commit, by attempt; see train.code.changes
samples/        texts and images that the task reports; see train.track.samples
tensorboard/, wandb/
wandb_checkpoints.json  which checkpoints W&B has; see train.track.wandb_sent
stopped.json    the torchrun job and its restart count at the last requested stop
finished.json   the final metrics; it exists only if the run is complete
lock            held by the process that trains
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from train.checkpoint.attempts import Attempts
from train.checkpoint.damage import damaged, unusable
from train.exits import ResumeRefusedError, RetryError, StoppedError, UsageError
from train.files import is_plain_name, open_regular, write_json
from train.json_files import Fields, is_count, read_object, shown
from train.json_text import finite
from train.process.diagnose import is_fault_of_machine

_LOCK = "lock"
_log = logging.getLogger("train")
_STOPPED = "stopped.json"
_IDENTITY: Fields = {"id": str, "name": str, "wandb_id": str, "created": (int, float)}
_STOP: Fields = {"launch": str, "restarts": int}


class InUseError(ResumeRefusedError):
    """Another process uses the run directory."""


@dataclass(frozen=True)
class RunIdentity:
    """What identifies a run through all its attempts."""

    id: str
    name: str
    """``run.name`` at the first start."""
    wandb_id: str
    created: float
    """Seconds since the epoch."""


class RunDirectory:
    """The files of one run. Only rank 0 calls the methods that write.

    While it holds the lock, these methods raise RetryError once another directory has its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.ledger = path / "ledger.bin"
        self.metrics = path / "metrics.jsonl"
        self.identity_path = path / "run.json"
        self.config_path = path / "config.json"
        self.finished_path = path / "finished.json"
        self.attempts = Attempts(path / "attempts.jsonl")
        self._lock: IO[str] | None = None
        self._opened: int | None = None
        """A descriptor of the directory that was locked."""

    @property
    def stop_file(self) -> Path:
        """Creating this file requests a stop."""
        return self.path / "stop"

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return self.identity_path.exists()

    def acquire(self) -> None:
        """Takes the lock, unless this process holds it; the kernel releases it when the process
        ends.

        Raises InUseError, which names the process that holds the lock.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._locked()
            self._opened = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise unusable(self.path / _LOCK, error) from error
        lock.truncate(0)
        lock.write(
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        lock.flush()
        # Forked data workers must not hold the lock: they can outlive a killed parent by seconds.
        os.register_at_fork(after_in_child=lock.close)
        self._lock = lock

    def _locked(self) -> IO[str]:
        """The open lock file, locked. Another process may replace it before it is locked."""
        path = self.path / _LOCK
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            lock = os.fdopen(open_regular(path, flags), "a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
                lock.close()
                raise InUseError(
                    f"The run directory {self.path} is in use by {holder}; wait for it to end, "
                    "stop it, or choose another run.dir."
                ) from None
            if _is_open_file(path, lock.fileno()):
                return lock
            lock.close()

    def ensure_in_place(self) -> None:
        """Raises RetryError if the directory was moved, replaced or removed since ``acquire``, or
        its lock file was: another process may then use the path. Does nothing without the lock."""
        if self._lock is None or self._opened is None:
            return
        if not _is_open_file(self.path, self._opened):
            raise RetryError(
                f"The run directory {self.path} was moved, replaced or removed while the run used "
                "it, so nothing more is written; rerun with run.dir set to the directory that has "
                "the run."
            )
        if not _is_open_file(self.path / _LOCK, self._lock.fileno()):
            raise RetryError(
                f"{self.path / _LOCK} was replaced or removed while the run held it, so another "
                "process may use the run directory, and nothing more is written; rerun once no "
                "other process uses it."
            )

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def identity(self, name: str) -> RunIdentity:
        """Reads the run's identity, or creates it at the first start.

        The environment variables ISORUN_RUN_ID and WANDB_RUN_ID set the ids at the first start and
        are ignored later. Raises ResumeRefusedError if run.json is damaged or missing.
        """
        path = self.identity_path
        if path.exists():
            values = self._read_json(path, _IDENTITY)
            if values.keys() != _IDENTITY.keys():
                raise damaged(path, "its keys are not those of an identity")
            for key in ("id", "wandb_id"):
                if not is_plain_name(values[key]):
                    raise damaged(path, f"its {key} is {shown(values[key])}")
            return RunIdentity(**values)
        if self.attempts.count():
            raise damaged(path, "it is missing")
        run_id = os.environ.get("ISORUN_RUN_ID") or new_run_id(name)
        wandb_id = os.environ.get("WANDB_RUN_ID") or run_id
        for variable, value in (("ISORUN_RUN_ID", run_id), ("WANDB_RUN_ID", wandb_id)):
            if not is_plain_name(value):
                raise UsageError(
                    f"{variable} is {shown(value)}, which cannot be a file name; set an id of "
                    "letters, digits, - and _."
                )
        identity = RunIdentity(run_id, name, wandb_id, time.time())
        write_json(path, asdict(identity))
        return identity

    def stored_config(self) -> dict[str, Any] | None:
        """The config of the last start; None before the first start."""
        path = self.config_path
        return self._read_json(path) if path.exists() else None

    def store_config(self, values: Mapping[str, Any]) -> None:
        """Replaces the stored config."""
        self.ensure_in_place()
        write_json(self.config_path, values)

    def record_attempt(self, values: Mapping[str, Any]) -> None:
        """Appends a line for this attempt to attempts.jsonl, durably."""
        self.ensure_in_place()
        self.attempts.record(values)

    def record_end(self, attempt: int, code: int, reason: str) -> None:
        """Records in attempts.jsonl how an attempt ended; an OSError is only logged, since the
        attempt ends anyway."""
        self.ensure_in_place()
        try:
            self.attempts.record_end(attempt, code, reason)
        except OSError as error:
            _log.warning("the end of the attempt could not be recorded: %s", error)

    def mark_stopped(self) -> None:
        """Records a requested stop with torchrun's run id and restart count, if torchrun started
        us."""
        self.ensure_in_place()
        if launch := _launch():
            write_json(self.path / _STOPPED, launch)

    def refuse_restart_after_stop(self) -> None:
        """Raises StoppedError if torchrun restarted the ranks after a requested stop.

        torchrun treats exit code 143 as a failure and restarts the ranks, with a higher restart
        count. If it stopped the ranks itself, for a change of membership, the count stays.
        """
        path, launch = self.path / _STOPPED, _launch()
        stopped = self._read_json(path, _STOP) if path.exists() else None
        restarted = (
            stopped is not None
            and launch is not None
            and stopped["launch"] == launch["launch"]
            and launch["restarts"] > stopped["restarts"]
        )
        if restarted:
            raise StoppedError(
                "The run stopped on request and is saved, so torchrun's restart does not resume "
                "it; rerun to resume."
            )
        path.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """What ``mark_finished`` recorded; None if the run is not complete. A metric that was not
        finite is NaN."""
        path = self.finished_path
        if not path.exists():
            return None
        values = self._read_json(path, {"step": int})
        if not is_count(values["step"]):
            raise damaged(path, f"its step is {shown(values['step'])}")
        if isinstance(metrics := values.get("metrics"), dict):
            nan = float("nan")
            values["metrics"] = {name: nan if v is None else v for name, v in metrics.items()}
        return values

    def mark_finished(self, values: Mapping[str, Any]) -> None:
        """Marks the run as complete."""
        self.ensure_in_place()
        write_json(self.finished_path, finite(values))

    def clear_finished(self) -> None:
        """Removes the mark of a complete run, so that it can be resumed."""
        self.ensure_in_place()
        self.finished_path.unlink(missing_ok=True)

    def _read_json(self, path: Path, form: Fields | None = None) -> dict[str, Any]:
        try:
            return read_object(path, form)
        except OSError as error:
            if is_fault_of_machine(error):
                raise unusable(path, error) from error
            raise damaged(path, error) from None
        except ValueError as error:
            raise damaged(path, error) from None


def _launch() -> dict[str, Any] | None:
    """The run id and restart count of the torchrun above; None without one. The node agent, which
    sets both as well, restarts no ranks that somebody has asked to stop, but those that its lost
    neighbour has stopped."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or "ISORUN_LAUNCHER" in os.environ:
        return None
    # A second torchrun with the same --rdzv-id starts at 0 restarts.
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return {"launch": os.environ["TORCHELASTIC_RUN_ID"], "restarts": restarts}


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the file or directory that is open, by device and inode."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def new_run_id(name: str) -> str:
    """A unique id for a run of this name; it is valid in file names and as a W&B run id."""
    return f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def slug(name: str) -> str:
    """The name with only letters, digits, ``_`` and ``-``; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
