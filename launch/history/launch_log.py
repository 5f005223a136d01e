"""The launch log: a file of the user, to which each launch and each end of a job adds a line.

The path is $XDG_STATE_HOME/isorun/launches.jsonl (default ~/.local/state/...). Lines are never
changed or removed. The log must not prevent a launch: if it cannot be written, a warning says so.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from launch.contract import (
    HIDDEN,
    RUN_ID,
    WANDB_ID,
    Exit,
    Fields,
    UsageError,
    code_version,
    first_line,
    has_fields,
    log,
    parsed_lines,
    private_directory,
    redact,
    redact_command,
)
from launch.history.image import image_digest
from launch.secrets import hide, is_secret

if TYPE_CHECKING:
    from torchx.specs import AppDef

FINAL = ("SUCCEEDED", "FAILED", "CANCELLED")
"""TorchX's states of a job that has ended."""

_NONE = type(None)
_FIELDS: dict[str, Fields] = {
    "submitted": {
        "time": (int, float), "handle": str, "scheduler": str, "run_id": str,
        "wandb_id": (str, _NONE), "name": str, "role": str, "nodes": int, "command": list,
        "image": str, "image_digest": (str, _NONE), "git": (dict, _NONE), "directory": str,
        "host": str, "pid": int, "request": str,
    },
    "cancelled": {"handle": str},
    "ended": {"time": (int, float), "handle": str, "state": str, "exit_codes": list},
}  # fmt: skip
"""The fields that a line of each event has."""
_OPTIONAL: Fields = {
    "time": (int, float), "pid": int, "directory": str, "message": str, "replicas": list,
}  # fmt: skip
"""The fields that some events, or lines of older versions, do not have."""
_DEFAULTS: dict[str, Any] = {"time": 0, "pid": 0, "directory": "", "message": "", "replicas": []}
_LATEST = 1 << 36  # seconds since the epoch; the calendar has no year for much larger numbers
_GIT: Fields = {"commit": str, "dirty": bool}


def path() -> Path:
    """The path of the log."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "isorun" / "launches.jsonl"


def read() -> Iterator[dict[str, Any]]:
    """All complete lines, the oldest first."""
    with suppress(FileNotFoundError), path().open("rb") as file:
        yield from (values for _, values in parsed_lines(file) if _is_complete(values))


def _is_complete(line: object) -> TypeGuard[dict[str, Any]]:
    """Whether the line has a known event and all fields that its readers need."""
    if not has_fields(line, {"event": str}):
        return False
    event = line["event"]
    return (
        event in _FIELDS
        and has_fields(line, _FIELDS[event])
        and has_fields({**_DEFAULTS, **line}, _OPTIONAL)
        and 0 <= line.get("time", 0) < _LATEST
        and 0 <= line.get("pid", 0) < 1 << 31
        and "\0" not in line.get("directory", "")
        and (not line.get("git") or has_fields(line["git"], _GIT))
        and (event != "ended" or all(type(code) is int for code in line["exit_codes"]))
    )


def is_ours(app: AppDef) -> bool:
    """Whether a component of isorun made the app."""
    return any(RUN_ID in role.env for role in app.roles)


def record_start(
    handle: str, scheduler: str, app: AppDef, request: str, *, log_directory: str | None = None
) -> None:
    """Adds a launch; ``request`` is the text of what the scheduler was given, and
    ``log_directory`` is where the job's logs are on this machine."""
    role = app.roles[0]
    _append(
        {
            "event": "submitted",
            "time": time.time(),
            "handle": handle,
            "scheduler": scheduler,
            "run_id": role.env[RUN_ID],
            "wandb_id": role.env.get(WANDB_ID),
            "name": app.name,
            "role": role.name,
            "job_type": role.env.get("WANDB_JOB_TYPE"),
            "nodes": role.num_replicas,
            "command": redact_command(role.args),
            "env": {k: HIDDEN if is_secret(k, v) else v for k, v in role.env.items()},
            "image": role.image,
            "image_digest": (
                None if scheduler in {"local_cwd", "slurm"} else image_digest(role.image)
            ),
            "git": _git_commit(),
            "directory": str(Path.cwd()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "log_directory": log_directory,
            # Docker gets some variables of this process too.
            "request": hide(
                request,
                [os.environ, *(role.env for role in app.roles)],
                [role.args for role in app.roles],
            ),
        }
    )


def record_cancel(handle: str) -> None:
    """Adds a request to stop a job. Docker reports a cancelled job as failed."""
    _append({"event": "cancelled", "time": time.time(), "handle": handle})


def was_cancelled(handle: str) -> bool:
    """Whether such a request was recorded."""
    return any(line["event"] == "cancelled" and line["handle"] == handle for line in read())


@dataclass(frozen=True)
class StatusText:
    """What a scheduler reports about a job, which it may remove soon."""

    message: str = ""
    replicas: tuple[str, ...] = ()
    """One line each: name, state and host."""

    @classmethod
    def of(cls, message: str | None, roles: Iterable[Any] | None) -> StatusText:
        """From the message and the roles of TorchX's status."""
        replicas = (replica for role in roles or () for replica in role.replicas)
        return cls(
            ""
            if message in {None, "<NONE>"}
            else redact(str(message)).strip(),  # <NONE>: TorchX's default
            tuple(f"{r.role}/{r.id}: {r.state.name} on {r.hostname or '?'}" for r in replicas),
        )

    @property
    def lines(self) -> list[str]:
        """The lines of both."""
        stripped = (line.strip() for line in self.message.splitlines())
        return [*filter(None, stripped), *self.replicas]


def record_end(
    handle: str, state: str, exit_codes: list[int], status: StatusText | None = None
) -> None:
    """Adds the end of a job, once, if its launch is in the log."""
    of_job = [line for line in read() if line["handle"] == handle]
    if of_job and not any(line["event"] == "ended" for line in of_job):
        _append(
            {
                "event": "ended",
                "time": time.time(),
                "handle": handle,
                "state": state,
                "exit_codes": exit_codes,
                **asdict(status or StatusText()),
            }
        )


def first_failure_code(codes: Sequence[int]) -> int | None:
    """The first exit code of the nodes that is not 0 or 143 (stopped on request); else 143 if
    there is one; else None."""
    failed = [code for code in codes if code]
    return next((code for code in failed if code != Exit.PREEMPTED), failed[0] if failed else None)


def of_this_process() -> tuple[str | None, dict[str, Any] | None]:
    """The handle of the newest job that this process launched, and the line of its end."""
    lines = list(read())
    host, pid = socket.gethostname(), os.getpid()
    handles = [x["handle"] for x in lines if x.get("pid") == pid and x.get("host") == host]
    ends = [x for x in lines if x["event"] == "ended" and handles and x["handle"] == handles[-1]]
    return handles[-1] if handles else None, ends[-1] if ends else None


def code_of_this_process() -> int | None:
    """The exit code of the newest job that this process launched; None if it succeeded, or has not
    ended."""
    _, end = of_this_process()
    return first_failure_code(end["exit_codes"]) if end else None


def _git_commit() -> dict[str, Any] | None:
    """The commit of the working directory, and whether it has uncommitted changes."""
    code = code_version()
    return {key: code[key] for key in ("commit", "dirty")} if "dirty" in code else None


def _append(values: dict[str, Any]) -> None:
    file = path()
    try:
        private_directory(file.parent)
        # One write with O_APPEND: lines of concurrent launches do not mix.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        descriptor = os.open(file, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # an older version may have made it under another mode
            os.write(descriptor, json.dumps(values).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        log(
            f"warning: the launch log {file} cannot be written ({reason}); this launch is not "
            "recorded."
        )
