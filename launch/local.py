"""What TorchX's schedulers for this very machine lack.

``local_cwd`` starts each node's agent as a process, all with the same host and, left alone, the
same port, each with all of the machine's cores; and it kills an agent ten seconds after asking it
to stop, which leaves the agent's ranks behind. ``local_docker`` asks for more cores than there are.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.history import ledger

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

_PATIENCE = 45.0  # seconds for an agent to stop its ranks, which by itself it does within 35
_POLL = 0.05


class OnThisMachine:
    """Goes before TorchX's LocalScheduler, see ``launch.schedulers``."""

    _apps: dict[str, Any]
    _cancelled: frozenset[str] = frozenset()

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Gives the nodes of an app a port of their own, and each its share of the cores."""
        for role in app.roles if ledger.is_ours(app) else ():
            if "--rdzv-port" not in role.args:
                role.env.setdefault("PET_RDZV_PORT", str(_free_port()))
            if "OMP_NUM_THREADS" not in os.environ:
                role.env.setdefault("OMP_NUM_THREADS", str(_threads(role)))
        return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def _cuda_device_count(self) -> int:
        """TorchX ends in a traceback where there is no nvidia-smi."""
        count: int = super()._cuda_device_count() if shutil.which("nvidia-smi") else 0  # type: ignore[misc]
        return count

    def describe(self, app_id: str) -> Any:
        """The state of a job: to TorchX one that was asked to stop has failed."""
        found = super().describe(app_id)  # type: ignore[misc]
        if found is not None and found.state.name == "FAILED" and app_id in self._cancelled:
            found.state = type(found.state).CANCELLED
        return found

    def _cancel_existing(self, app_id: str) -> None:
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

    def exit_codes(self, app_id: str) -> list[int]:
        """Of the agents, as a shell has them."""
        codes = (p.poll() for p in _processes(self._apps[app_id])) if app_id in self._apps else ()
        return [128 - code if code < 0 else code for code in codes if code is not None]

    def _stop(self, apps: list[Any]) -> None:
        """Asks the agents to stop, and gives them the time for it."""
        processes = [process for app in apps for process in _processes(app, alive=True)]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)


class InContainers:
    """Goes before TorchX's DockerScheduler."""

    _docker_client: Any

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Docker refuses a container more cores than there are; a laptop has few."""
        for role in app.roles if ledger.is_ours(app) else ():
            with suppress(Exception):  # no engine: a dry run needs none
                cores = int(self._docker_client.info()["NCPU"])
                role.resource = replace(role.resource, cpu=min(role.resource.cpu, cores))
        return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def exit_codes(self, app_id: str) -> list[int]:
        """Of the containers."""
        containers = self._get_containers(app_id)  # type: ignore[attr-defined]
        return [container.attrs["State"]["ExitCode"] for container in containers]


def _processes(app: Any, *, alive: bool = False) -> list[Any]:
    found = [replica.proc for replicas in app.role_replicas.values() for replica in replicas]
    return [process for process in found if not alive or process.poll() is None]


def _kill_rest(app_id: str) -> None:
    """What an agent left behind, as one that was killed does: ranks and their children all carry
    the job's name in their environment."""
    mark = f"/{app_id}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for entry in (directory / "environ").read_bytes().split(b"\0"):
                if entry.startswith(b"TORCHX_JOB_ID=") and entry.endswith(mark):
                    os.kill(int(directory.name), signal.SIGKILL)


def _threads(role: Role) -> int:
    """An equal share of the cores for each process of all nodes."""
    words = iter(role.args)
    said = next(words, "") if "--nproc-per-node" in words else ""  # which reads up to it
    per_node = int(said) if said.isdigit() else 1
    return max(1, len(os.sched_getaffinity(0)) // (per_node * int(role.num_replicas)))


def _free_port() -> int:
    """One that nobody has now; the kernel gives out others for a while before this one again."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
