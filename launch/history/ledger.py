"""The launch ledger: a file of the user's to which each launch and each end adds a line.

It lies in $XDG_STATE_HOME/isorun/launches.jsonl (by default ~/.local/state/...). Nothing in it is
ever changed or removed. It must never stand in the way of a launch: what cannot be written is
said, and left out.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.contract import Exit
from launch.secrets import hide, is_secret

if TYPE_CHECKING:
    from torchx.specs import AppDef

FINAL = ("SUCCEEDED", "FAILED", "CANCELLED")
_RUN_ID = "ISORUN_RUN_ID"


def path() -> Path:
    """Where the ledger lies."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "isorun" / "launches.jsonl"


def read() -> Iterator[dict[str, Any]]:
    """All lines that are whole, the oldest first."""
    with suppress(FileNotFoundError), path().open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict):
                    yield values


def is_ours(app: AppDef) -> bool:
    """Whether an app was made by isorun's components."""
    return any(_RUN_ID in role.env for role in app.roles)


def record_start(handle: str, scheduler: str, app: AppDef, request: str) -> None:
    """Adds the line of a launch; ``request`` is what the scheduler was given, rendered."""
    role = app.roles[0]
    _append(
        {
            "event": "submitted",
            "time": time.time(),
            "handle": handle,
            "scheduler": scheduler,
            "run_id": role.env[_RUN_ID],
            "wandb_id": role.env.get("WANDB_RUN_ID"),
            "name": app.name,
            "role": role.name,
            "job_type": role.env.get("WANDB_JOB_TYPE"),
            "nodes": role.num_replicas,
            "command": role.args,
            "env": {k: "***" if is_secret(k) else v for k, v in role.env.items()},
            "image": role.image,
            "image_digest": None if scheduler in {"local_cwd", "slurm"} else _digest(role.image),
            "git": _git(),
            "directory": str(Path.cwd()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            # Docker is handed some of this process's own environment.
            "request": hide(request, [os.environ, *(role.env for role in app.roles)]),
        }
    )


def record_cancel(handle: str) -> None:
    """Adds the line of a request to stop. Of some jobs only this tells one that was cancelled from
    one that failed."""
    _append({"event": "cancelled", "time": time.time(), "handle": handle})


def was_cancelled(handle: str) -> bool:
    """Whether that was recorded of a job."""
    return any(line["event"] == "cancelled" and line.get("handle") == handle for line in read())


@dataclass(frozen=True)
class Said:
    """What a scheduler says of a job, which it may soon forget."""

    message: str = ""
    replicas: tuple[str, ...] = ()
    """A line for each: name, state and host."""

    @property
    def lines(self) -> list[str]:
        """All of it."""
        stripped = (line.strip() for line in self.message.splitlines())
        return [*filter(None, stripped), *self.replicas]


def said(message: str | None, roles: Iterable[Any] | None) -> Said:
    """From the message and the roles of TorchX's status."""
    replicas = (replica for role in roles or () for replica in role.replicas)
    return Said(
        "" if message in {None, "<NONE>"} else str(message).strip(),  # the latter is TorchX's word
        tuple(f"{r.role}/{r.id}: {r.state.name} on {r.hostname or '?'}" for r in replicas),
    )


def record_end(
    handle: str, state: str, exit_codes: list[int], by_scheduler: Said | None = None
) -> None:
    """Adds the line of an end, once, for a launch that is in the ledger."""
    mine = [line for line in read() if line.get("handle") == handle]
    if mine and not any(line["event"] == "ended" for line in mine):
        _append(
            {
                "event": "ended",
                "time": time.time(),
                "handle": handle,
                "state": state,
                "exit_codes": exit_codes,
                **asdict(by_scheduler or Said()),
            }
        )


def telling_code(codes: list[int]) -> int | None:
    """Of the nodes' exit codes the first that says more than that a node was asked to stop, else
    any; None if all ended well."""
    bad = [code for code in codes if code]
    return next((code for code in bad if code != Exit.PREEMPTED), bad[0] if bad else None)


def of_this_process() -> tuple[str | None, dict[str, Any] | None]:
    """The handle of the newest job that this process launched, and the line of its end."""
    lines = list(read())
    mine = [x["handle"] for x in lines if x.get("pid") == os.getpid() and _is_here(x)]
    ends = [x for x in lines if x["event"] == "ended" and mine and x["handle"] == mine[-1]]
    return mine[-1] if mine else None, ends[-1] if ends else None


def code_of_this_process() -> int | None:
    """How the newest job that this process launched ended; None if well, or if it is not known."""
    _, end = of_this_process()
    return telling_code(end["exit_codes"]) if end else None


def _is_here(line: dict[str, Any]) -> bool:
    return bool(line.get("host") == socket.gethostname())


def _append(values: dict[str, Any]) -> None:
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several launches do not mix.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, json.dumps(values).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(
            f"isorun: the launch ledger {file} cannot be written ({error.strerror}); the launch "
            "is not recorded.",
            file=sys.stderr,
        )


def _digest(image: str) -> str | None:
    """What an image's name stands for now, where that can be known without pulling it."""
    if match := re.search(r"sha256:[0-9a-f]{64}", image):
        return match[0]
    try:
        # By name: there is a directory `docker` in this project, which type checkers find first.
        client = import_module("docker").from_env(timeout=5)
        try:
            found = client.images.get(image)
            names: list[str] = found.attrs["RepoDigests"]
            return names[0].partition("@")[2] if names else str(found.id)
        finally:
            client.close()
    except Exception:  # no engine, no such image, no library: then it is not known
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether it has changes that no commit holds."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
