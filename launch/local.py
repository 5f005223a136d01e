"""What TorchX's scheduler for this very machine lacks.

``local_cwd`` starts each node's agent as a process, all with the same host and, left alone, the
same port, each with all of the machine's cores; it kills an agent ten seconds after asking it to
stop, which leaves the agent's ranks behind; and a job is known to the command alone that started
it. The launch ledger knows it everywhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from ast import literal_eval
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError
from launch.deadlines import grace_period
from launch.history import ledger
from launch.ports import free_port

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

    from launch.history.launches import Launch

_POLL = 0.05


class OnThisMachine:
    """Goes before TorchX's LocalScheduler, see ``launch.schedulers``."""

    _apps: dict[str, Any]
    _cancelled: frozenset[str] = frozenset()

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Gives the nodes of an app a port of their own, and each its share of the cores."""
        for role in app.roles if ledger.is_ours(app) else ():
            if "--rdzv-port" not in role.args:
                role.env.setdefault("PET_RDZV_PORT", str(free_port()))
            # An agent divides the cores among its ranks, but does not know of other nodes here.
            if role.num_replicas > 1 and "OMP_NUM_THREADS" not in os.environ:
                processes = role.num_replicas * _processes_per_node(role, self._devices())
                threads = max(1, len(os.sched_getaffinity(0)) // processes)
                role.env.setdefault("OMP_NUM_THREADS", str(threads))
        return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def _cuda_device_count(self) -> int:
        """TorchX ends in a traceback where there is no nvidia-smi."""
        count: int = super()._cuda_device_count() if shutil.which("nvidia-smi") else 0  # type: ignore[misc]
        return count

    def _devices(self) -> int:
        """What each agent finds."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return self._cuda_device_count()
        return len([name for name in visible.split(",") if name.strip()])

    def describe(self, app_id: str) -> Any:
        """The state of a job: to TorchX one that was asked to stop has failed. Of one of another
        command what the ledger says; None if that command was killed or is not known."""
        if app_id not in self._apps:
            return _as_recorded(app_id)
        try:
            found = super().describe(app_id)  # type: ignore[misc]
        except FileNotFoundError:  # `close` has just removed the directory of its logs
            return _as_recorded(app_id)
        if found is not None and found.state.name == "FAILED" and app_id in self._cancelled:
            found.state = type(found.state).CANCELLED
        return found

    def list(self, *_: Any) -> Any:
        """All jobs of the ledger; UNKNOWN is one whose command was killed. TorchX's nightly hands
        over the scheduler's options."""
        from torchx.schedulers.api import ListAppResponse
        from torchx.specs import AppState

        states = AppState.__members__
        return [
            ListAppResponse(app_id=x.job, state=states.get(x.refresh(), AppState.UNKNOWN))
            for x in _launches()
        ]

    def log_iter(
        self, app_id: str, role_name: str, k: int = 0, regex: str | None = None, *rest: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The lines of a node's log, of a job of another command as well. Raises UsageError if
        they are not there any more."""
        if app_id in self._apps:
            return super().log_iter(app_id, role_name, k, regex, *rest, **options)  # type: ignore[misc]
        from torchx.schedulers import local_scheduler as theirs
        from torchx.schedulers.api import Stream, filter_regex

        names = {Stream.STDOUT: theirs.STDOUT_LOG, Stream.STDERR: theirs.STDERR_LOG}
        name = names.get(options.get("streams"), theirs.COMBINED_LOG)
        file = log_directory(app_id) / role_name / str(k) / name
        lines = theirs.split_lines_iterator(theirs.LogIterator(app_id, str(file), self))
        return filter_regex(regex, lines) if regex else lines

    def _cancel_existing(self, app_id: str) -> None:
        if app_id not in self._apps:
            # The command that it runs under stops it, and writes down how it ended.
            os.kill(_launch(app_id).line["pid"], signal.SIGTERM)
            return
        self._cancelled |= {app_id}
        try:
            self._stop([self._apps[app_id]])
        finally:
            super()._cancel_existing(app_id)  # type: ignore[misc]
            _kill_rest(app_id)
        self.note_end(app_id, "CANCELLED")  # type: ignore[attr-defined]

    def close(self) -> None:
        """The end of the command that started them, a Ctrl-C included."""
        running = {i: app for i, app in self._apps.items() if _processes(app, alive=True)}
        self._cancelled |= running.keys()
        try:
            self._stop(list(running.values()))
        finally:
            super().close()  # type: ignore[misc]
            for app_id in running:
                _kill_rest(app_id)
                self.note_end(app_id, "CANCELLED")  # type: ignore[attr-defined]

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """Of the agents, as a shell has them."""
        codes = (p.poll() for p in _processes(self._apps[app_id])) if app_id in self._apps else ()
        return [128 - code if code < 0 else code for code in codes if code is not None]

    def _stop(self, apps: Sequence[Any]) -> None:
        """Asks the agents to stop, and gives them the time for it."""
        processes = [process for app in apps for process in _processes(app, alive=True)]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        longest = max((patience(_environment(p.pid)) for p in processes), default=0.0)
        deadline = time.monotonic() + longest
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)


def patience(environ: Mapping[str, str]) -> float:
    """Seconds to wait for an agent that was asked to stop; ``environ`` is its environment."""
    with suppress(KeyError, ValueError):
        return grace_period(float(environ["PET_SHUTDOWN_TIMEOUT"]))
    return grace_period()


def log_directory(app_id: str) -> Path:
    """Where the logs of a job of any command lie. Raises UsageError if there are none, which says
    what is left."""
    launch = _launch(app_id)
    state = launch.refresh()
    where = "its log went with it"
    with suppress(ValueError, SyntaxError, LookupError, TypeError):
        directory = Path(literal_eval(launch.line["request"])["log_dir"])
        if directory.is_dir():
            if state in {"RUNNING", *ledger.FINAL}:
                return directory
            where = f"its log is in {directory}"
    raise UsageError(
        f"{launch.handle} is {state}: the command that it ran under is gone, and {where}. `python "
        f"-m launch why {launch.run_id}` tells what is known; -cfg log_dir=DIR keeps the next log."
    )


def _launches() -> list[Launch]:
    from launch.history.launches import all_launches

    return [launch for launch in all_launches() if launch.line["scheduler"] == "local_cwd"]


def _launch(app_id: str) -> Launch:
    """Raises UsageError."""
    found = [launch for launch in _launches() if launch.job == app_id]
    if not found:
        raise UsageError(
            f"{app_id!r} is no job of local_cwd in {ledger.path()}; `torchx list -s local_cwd` "
            "names them."
        )
    return found[-1]


def _as_recorded(app_id: str) -> Any:
    from torchx.schedulers.api import DescribeAppResponse
    from torchx.specs import AppState, Role

    with suppress(UsageError):
        launch = _launch(app_id)
        state = launch.refresh()
        if state in {"RUNNING", *ledger.FINAL}:
            line = launch.line
            role = Role(line["role"], image=line["image"], num_replicas=line["nodes"])
            return DescribeAppResponse(app_id=app_id, roles=[role], state=AppState[state], msg="")
    return None


def _processes(app: Any, *, alive: bool = False) -> list[Any]:
    found = [replica.proc for replicas in app.role_replicas.values() for replica in replicas]
    return [process for process in found if not alive or process.poll() is None]


def _kill_rest(app_id: str) -> None:
    """What an agent left behind, as one that was killed does: ranks and their children all carry
    the job's name in their environment."""
    for directory in Path("/proc").glob("[0-9]*"):
        if _environment(int(directory.name)).get("TORCHX_JOB_ID", "").endswith(f"/{app_id}"):
            with suppress(OSError):
                os.kill(int(directory.name), signal.SIGKILL)


def _environment(pid: int) -> dict[str, str]:
    """Of a process; empty if it is gone or somebody else's."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(entry.partition("=")[::2] for entry in text.split("\0"))
    return {}


def _processes_per_node(role: Role, devices: int) -> int:
    """As its agents will have them."""
    words = iter(role.args)
    said = next(words, "") if "--nproc-per-node" in words else ""  # which reads up to it
    return int(said) if said.isdigit() else max(1, devices)
