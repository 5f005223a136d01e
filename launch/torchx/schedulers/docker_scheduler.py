"""TorchX's scheduler for Docker on this machine, with the corrections that isorun's jobs need.

TorchX's own requests more cores than the machine has, restarts containers after any exit code,
gives them ten seconds to stop, reports a stopped job as failed, and reports a job whose containers
were removed as succeeded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from torchx.schedulers import docker_scheduler as theirs
from torchx.schedulers.docker_scheduler import create_scheduler

from launch.agent_command import agent_arguments
from launch.contract import SECRET, TRAIN, UsageError, config_arguments, log, new_secret
from launch.history import launch_log
from launch.torchx.schedulers.local_scheduler import seconds_to_stop
from launch.torchx.schedulers.watched import Recorded

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

__all__ = ["LocalDockerScheduler", "create_scheduler"]


class LocalDockerScheduler(Recorded, theirs.DockerScheduler):  # type: ignore[misc]
    """See the module."""

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Limits the cores to those of the machine, gives several nodes a secret, and warns of what
        containers cannot do."""
        for role in app.roles if launch_log.is_ours(app) else ():
            with suppress(Exception):  # a dry run needs no Docker engine
                cores = int(self._docker_client.info()["NCPU"])
                role.resource = replace(role.resource, cpu=min(role.resource.cpu, cores))
            if role.num_replicas > 1:
                # Containers do not inherit an environment.
                own = {name: os.environ[name] for name in (SECRET,) if os.environ.get(name)}
                role.env.update({**own, **new_secret({**own, **role.env}), **role.env})
            if role.max_retries:
                log(
                    f"warning: --max_retries {role.max_retries} is ignored: Docker restarts a "
                    "container after any exit code, and without the other containers; use "
                    "--max_restarts, with which the agents restart the ranks after retryable "
                    "failures."
                )
                role.max_retries = 0
            for file in _unmounted(role):
                log(
                    f"warning: The config file {file} is not in a mount; unless the image contains "
                    f"it, add --mounts type=bind,src={file},dst={file},readonly"
                )
        return super().submit_dryrun(app, cfg)

    def schedule(self, dryrun_info: Any) -> str:
        """Starts all containers, or none: TorchX leaves those that it started before a failure."""
        try:
            app_id: str = super().schedule(dryrun_info)
        except BaseException:
            with suppress(Exception):
                for container in self._get_containers(dryrun_info.request.app_id):
                    container.remove(force=True)
            raise
        return app_id

    def describe(self, app_id: str) -> Any:
        """The state of a job; None if its containers are gone."""
        if not self._get_containers(app_id):
            return None
        found = super().describe(app_id)
        if found.state.name == "FAILED" and launch_log.was_cancelled(self.handle(app_id)):
            found.state = type(found.state).CANCELLED
        return found

    def _cancel_existing(self, app_id: str) -> None:
        """Stops all containers at the same time, each within its agent's shutdown timeout."""
        # Recorded first: a `torchx run` that waits for the job reads the log when it ends.
        launch_log.record_cancel(self.handle(app_id))
        containers = self._get_containers(app_id)
        with ThreadPoolExecutor(max(1, len(containers))) as pool:
            list(pool.map(_stop, containers))
        self.note_end(app_id, "CANCELLED")

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """The exit codes of the containers."""
        return [c.attrs["State"]["ExitCode"] for c in self._get_containers(app_id)]


def _stop(container: Any) -> None:
    variables = container.attrs["Config"]["Env"] or ()
    environ = dict(variable.partition("=")[::2] for variable in variables)
    container.stop(timeout=round(seconds_to_stop(environ)))


def _unmounted(role: Role) -> Iterator[str]:
    """Config files outside the working directory, of which the image has most likely a copy, and
    outside all mounts."""
    mounted = [PurePosixPath(mount.dst_path) for mount in role.mounts]
    for file in _config_files(role.args):
        path = PurePosixPath(file)
        outside = path.is_absolute() or ".." in path.parts
        if outside and not any(path.is_relative_to(directory) for directory in mounted):
            yield file


def _config_files(args: Sequence[str]) -> Sequence[str]:
    words = [word.replace("$$", "$") for word in args]
    started = agent_arguments(words)
    command = started[1] if started else words
    with suppress(ValueError, TypeError, KeyError, IndexError):  # only a sweep's args end in JSON
        command = [*TRAIN, "fit", *json.loads(words[-1])["config"]]
    with suppress(UsageError):  # reported by the run
        if arguments := config_arguments(command):
            return list(arguments.config)
    return []
