"""TorchX's scheduler ``local_cwd``, with the corrections that isorun's jobs need.

TorchX's own starts each node's agent as a process, all with the same rendezvous port and all cores
of the machine; it kills an agent ten seconds after a stop request, so that the agent's ranks keep
running; and only the command that started a job knows it. Here other commands find it in the launch
log.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchx.schedulers import local_scheduler as theirs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Stream, filter_regex
from torchx.schedulers.local_scheduler import create_scheduler
from torchx.specs import AppState, Role

from launch.agent_command import options_of, variable
from launch.contract import (
    UsageError,
    finite_number,
    new_secret,
    threads_per_process,
    whole_number,
)
from launch.deadlines import grace_period
from launch.history import launch_log
from launch.ports import free_port
from launch.torchx.schedulers.watched import Recorded

if TYPE_CHECKING:
    from torchx.specs import AppDef

    from launch.history.launches import Launch

__all__ = ["LocalCwdScheduler", "create_scheduler"]

_POLL = 0.05  # seconds


class LocalCwdScheduler(Recorded, theirs.LocalScheduler):  # type: ignore[misc]
    """See the module."""

    def __init__(self, session_name: str, **parameters: Any) -> None:
        super().__init__(session_name, **parameters)
        self._cancelled: set[str] = set()

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Gives the nodes of an app a free rendezvous port and a secret, and each its share of
        the cores."""
        for role in app.roles if launch_log.is_ours(app) else ():
            if "--rdzv-port" not in role.args:
                role.env.setdefault(variable("rdzv-port"), str(free_port()))
            if role.num_replicas > 1:
                role.env.update(new_secret({**os.environ, **role.env}))
            # An agent divides all cores among its ranks; it does not know of other nodes here.
            if role.num_replicas > 1 and "OMP_NUM_THREADS" not in os.environ:
                processes = role.num_replicas * _processes_per_node(role, self._devices())
                role.env.setdefault("OMP_NUM_THREADS", str(threads_per_process(processes)))
        return super().submit_dryrun(app, cfg)

    def _cuda_device_count(self) -> int:
        """The number of GPUs; TorchX's own method raises an error without nvidia-smi."""
        count: int = super()._cuda_device_count() if shutil.which("nvidia-smi") else 0
        return count

    def _devices(self) -> int:
        """The number of GPUs that an agent sees."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return self._cuda_device_count()
        return len([name for name in visible.split(",") if name.strip()])

    def describe(self, app_id: str) -> Any:
        """The state of a job. TorchX reports a cancelled job as failed. The state of another
        command's job is read from the launch log; None if it is unknown, or if that command was
        killed and the job has ended."""
        if app_id not in self._apps:
            return _as_recorded(app_id)
        try:
            found = super().describe(app_id)
        except FileNotFoundError:  # `close` has just removed the log directory
            return _as_recorded(app_id)
        if found is not None and found.state.name == "FAILED" and app_id in self._cancelled:
            found.state = AppState.CANCELLED
        return found

    def list(self, *_: Any) -> Any:
        """All jobs in the launch log; UNKNOWN if the command of one was killed. TorchX's nightly
        passes the scheduler's options."""
        states = AppState.__members__
        return [
            ListAppResponse(app_id=x.job, state=states.get(x.refresh(), AppState.UNKNOWN))
            for x in _launches()
        ]

    def log_iter(
        self, app_id: str, role_name: str, k: int = 0, regex: str | None = None, *rest: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The lines of a node's log, also of another command's job. Raises UsageError if the log
        is gone."""
        if app_id in self._apps:
            return super().log_iter(app_id, role_name, k, regex, *rest, **options)
        names = {Stream.STDOUT: theirs.STDOUT_LOG, Stream.STDERR: theirs.STDERR_LOG}
        name = names.get(options.get("streams"), theirs.COMBINED_LOG)
        file = log_directory(app_id) / role_name / str(k) / name
        lines = theirs.split_lines_iterator(theirs.LogIterator(app_id, str(file), self))
        return filter_regex(regex, lines) if regex else lines

    def _cancel_existing(self, app_id: str) -> None:
        if app_id not in self._apps:
            launch = _launch(app_id)
            if launch.refresh() == "LOST":
                self._stop_orphans(app_id)
            else:
                # The command that started the job stops it and records its end.
                os.kill(launch.line["pid"], signal.SIGTERM)
            return
        self._cancelled.add(app_id)
        try:
            self._stop([self._apps[app_id]])
        finally:
            super()._cancel_existing(app_id)
            _kill_rest(app_id)
        self.note_end(app_id, "CANCELLED")

    def close(self) -> None:
        """Stops the jobs of this command at its end, also after Ctrl-C."""
        running = {i: app for i, app in self._apps.items() if _processes(app, alive=True)}
        self._cancelled |= running.keys()
        try:
            self._stop(list(running.values()))
        finally:
            super().close()
            for app_id in running:
                _kill_rest(app_id)
                self.note_end(app_id, "CANCELLED")

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """The exit codes of the agents, as a shell reports them."""
        codes = (p.poll() for p in _processes(self._apps[app_id])) if app_id in self._apps else ()
        return [128 - code if code < 0 else code for code in codes if code is not None]

    def _stop_orphans(self, app_id: str) -> None:
        """Stops a job whose command was killed."""
        processes = _left_of(app_id)
        # The agents: of each process tree the first one, which passes the signal on.
        for pid in processes.keys() - {
            pid for pid, parent in processes.items() if parent in processes
        }:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + max(
            (seconds_to_stop(_environment(pid)) for pid in processes), default=0.0
        )
        while _left_of(app_id) and time.monotonic() < deadline:
            time.sleep(_POLL)
        _kill_rest(app_id)
        self.note_end(app_id, "CANCELLED")

    def _stop(self, apps: Sequence[Any]) -> None:
        """Sends SIGTERM to the agents and waits for them, up to their grace period."""
        processes = [process for app in apps for process in _processes(app, alive=True)]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        longest = max((seconds_to_stop(_environment(p.pid)) for p in processes), default=0.0)
        deadline = time.monotonic() + longest
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)


def seconds_to_stop(environ: Mapping[str, str]) -> float:
    """The grace period of an agent with this environment."""
    timeout = finite_number(environ.get(variable("shutdown-timeout"), ""))
    return grace_period() if timeout is None else grace_period(timeout)


def log_directory(app_id: str) -> Path:
    """The log directory of any command's job. Raises UsageError if the log is gone, or is not
    complete."""
    launch = _launch(app_id)
    state = launch.refresh()
    recorded = launch.line.get("log_directory")  # not recorded by older versions
    directory = Path(recorded) if recorded else None
    where = "removed its log" if recorded else "did not record where its log is"
    if directory and directory.is_dir():
        if state in {"RUNNING", *launch_log.FINAL}:
            return directory
        where = f"left its log in {directory}"
    raise UsageError(
        f"{launch.handle} is {state}: the `torchx run` that started it has ended and {where}; see "
        f"`isorun why {launch.run_id}`, and keep later logs with -cfg log_dir=DIR."
    )


def _launches() -> list[Launch]:
    from launch.history.launches import all_launches

    return [launch for launch in all_launches() if launch.line["scheduler"] == "local_cwd"]


def _launch(app_id: str) -> Launch:
    """Raises UsageError."""
    found = [launch for launch in _launches() if launch.job == app_id]
    if not found:
        raise UsageError(
            f"local_cwd has no job {app_id!r} in {launch_log.path()}; list its jobs with `torchx "
            "list -s local_cwd`."
        )
    return found[-1]


def _as_recorded(app_id: str) -> Any:
    with suppress(UsageError):
        launch = _launch(app_id)
        state = launch.refresh()
        if state == "LOST" and _left_of(app_id):
            state = "RUNNING"
        if state in {"RUNNING", *launch_log.FINAL}:
            line = launch.line
            role = Role(line["role"], image=line["image"], num_replicas=line["nodes"])
            return DescribeAppResponse(app_id=app_id, roles=[role], state=AppState[state], msg="")
    return None


def _processes(app: Any, *, alive: bool = False) -> list[Any]:
    found = [replica.proc for replicas in app.role_replicas.values() for replica in replicas]
    return [process for process in found if not alive or process.poll() is None]


def _kill_rest(app_id: str) -> None:
    """Kills what a killed agent leaves running."""
    for pid in _left_of(app_id):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _left_of(app_id: str) -> dict[int, int]:
    """The processes of a job, each with its parent: the environment of its agents, its ranks and
    their children holds the job's name."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        if _environment(pid).get("TORCHX_JOB_ID", "").endswith(f"/{app_id}"):
            with suppress(OSError):
                # The name of the program, in brackets, may contain anything.
                state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[pid] = int(parent)
    return found


def _environment(pid: int) -> dict[str, str]:
    """The environment of a process; empty if it has ended or belongs to another user."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(entry.partition("=")[::2] for entry in text.split("\0"))
    return {}


def _processes_per_node(role: Role, devices: int) -> int:
    """The number of ranks that the role's agents start; 1 for a role without agents."""
    options = options_of(role.args, role.env)
    given = options.text("nproc-per-node") if options else _option(role.args, "--nproc-per-node")
    return whole_number(given) or max(1, devices)


def _option(words: Sequence[str], option: str) -> str:
    """The value after an option; empty if it is not there."""
    return next((value for word, value in pairwise(words) if word == option), "")
