"""The run directory: a run's identity, its lock, its attempts, and all else that it writes.

run.json        who the run is: written once, at its birth, and never again
config.json     the config in force
attempts.jsonl  a line for each start: host, process, world, code, where it went on from
checkpoints/    see train.checkpoint.store
ledger.bin      which samples were used: see train.data.ledger
metrics.jsonl   all that was measured
micro_batches.json  what fits into memory: see train.loop.batch_size_finder
logs/           a log file per rank
tensorboard/, wandb/
stopped.json    which start of torchrun's was asked to stop
finished.json   the final metrics; its presence says that the run is complete
lock            held by the process that trains
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from train.exits import ResumeRefusedError, StoppedError
from train.files import replace_text

_FINISHED = "finished.json"
_STOPPED = "stopped.json"


@dataclass(frozen=True)
class Identity:
    """What a run keeps through all its restarts."""

    id: str
    name: str
    wandb_id: str
    created: float
    """Seconds since the epoch."""


class RunDirectory:
    """The files of one run. Only rank 0 writes through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.ledger = path / "ledger.bin"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = None

    @property
    def stop_file(self) -> Path:
        """Whoever creates it asks the run to stop."""
        return self.path / "stop"

    @property
    def exists(self) -> bool:
        """Whether a run was born here."""
        return (self.path / "run.json").exists()

    def acquire(self) -> None:
        """Takes the lock for the life of this process, unless it has it; ResumeRefusedError
        names who else has it.

        The kernel gives the lock back when the process ends, however it ends.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ResumeRefusedError(
                f"The run directory {self.path} is in use by {holder}; wait for it to end, stop "
                "it, or choose another run.dir."
            ) from None
        lock.truncate(0)
        lock.write(
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        lock.flush()
        # Forked data workers must not hold it: they outlive a killed parent by some seconds.
        os.register_at_fork(after_in_child=lock.close)
        self._lock = lock

    def release(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def identity(self, name: str) -> Identity:
        """The run's identity: read, or made here and now where there is none yet.

        A launcher that gives out identities sets ISORUN_RUN_ID and WANDB_RUN_ID before the run's
        birth; later they are not looked at.
        """
        path = self.path / "run.json"
        if path.exists():
            values = self._read_json(path)
            if values.keys() != {field.name for field in fields(Identity)}:
                raise _damaged(path, "it is no identity")
            return Identity(**values)
        if self.attempts():
            raise _damaged(path, "it is missing")
        run_id = os.environ.get("ISORUN_RUN_ID") or new_run_id(name)
        wandb_id = os.environ.get("WANDB_RUN_ID") or run_id
        identity = Identity(run_id, name, wandb_id, time.time())
        write_json(path, asdict(identity))
        return identity

    def stored_config(self) -> dict[str, Any] | None:
        """The config that the run was last started with; None before the first start."""
        path = self.path / "config.json"
        return self._read_json(path) if path.exists() else None

    def store_config(self, values: Mapping[str, Any]) -> None:
        """Makes this the config in force."""
        write_json(self.path / "config.json", values)

    def attempts(self) -> int:
        """How many starts there were so far; each has a line, whatever became of it."""
        path = self.path / "attempts.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def record_attempt(self, values: Mapping[str, Any]) -> None:
        """Appends a line for this start, durably."""
        with (self.path / "attempts.jsonl").open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was torn by a crash
                    file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def last_attempt(self) -> dict[str, Any]:
        """What the newest start recorded; empty if there was none, or a crash tore its line."""
        path = self.path / "attempts.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        try:
            values = json.loads(lines[-1]) if lines else {}
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def mark_stopped(self) -> None:
        """Notes that the run stopped on request, and under which start of its launcher."""
        if launch := _launch():
            write_json(self.path / _STOPPED, launch)

    def refuse_undoing_a_stop(self) -> None:
        """torchrun takes a stop for a failure and starts the ranks again, which is not what was
        asked for: then StoppedError. It counts that as a restart, and does not where it has
        stopped the ranks itself because nodes come or go."""
        path, launch = self.path / _STOPPED, _launch()
        stopped = self._read_json(path) if path.exists() else None
        again = (
            stopped is not None
            and launch is not None
            and stopped["launch"] == launch["launch"]
            and launch["restarts"] > stopped["restarts"]
        )
        if again:
            raise StoppedError(
                "The run was asked to stop and is saved, so torchrun's restart does not go on "
                "with it; start it again to go on."
            )
        path.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """What ``finish`` recorded, if the run is complete."""
        path = self.path / _FINISHED
        return self._read_json(path) if path.exists() else None

    def finish(self, values: Mapping[str, Any]) -> None:
        """Marks the run as complete."""
        write_json(self.path / _FINISHED, values)

    def unfinish(self) -> None:
        """Takes the mark away: the run is to go on after all."""
        (self.path / _FINISHED).unlink(missing_ok=True)

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return values


def _launch() -> dict[str, Any] | None:
    """The torchrun, or node agent, that this process belongs to, and how often it has started
    the ranks again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # Two with the same --rdzv-id one after the other: the second begins with 0 restarts.
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return {"launch": os.environ["TORCHELASTIC_RUN_ID"], "restarts": restarts}


def _damaged(path: Path, why: object) -> ResumeRefusedError:
    return ResumeRefusedError(
        f"{path} is damaged ({why}), so this run cannot be told from another; restore the file, "
        "or start a new run in another run.dir."
    )


def new_run_id(name: str) -> str:
    """A unique id for a run of this name; it is valid in file names and as a W&B run id."""
    return f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def slug(name: str) -> str:
    """The name with only letters, digits, ``_`` and ``-``; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replaces a JSON file at once and durably: readers see the old text or the new one."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def code_version() -> dict[str, Any]:
    """The package version, and the git commit of the working directory where there is one."""
    from train import __version__

    version: dict[str, Any] = {"isorun": __version__}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        version["commit"] = git("rev-parse", "HEAD")
        version["dirty"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        pass  # no git, no repository, no commit: then there is nothing to say
    return version
