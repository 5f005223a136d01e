"""What TorchX's scheduler for Docker on this machine lacks.

It asks for more cores than there are, starts containers again whatever they ended with, gives them
ten seconds to stop, takes a job that was stopped for one that failed, and one whose containers were
removed for one that went well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from launch.history import ledger
from launch.local import patience

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role


class InContainers:
    """Goes before TorchX's DockerScheduler, see ``launch.schedulers``."""

    _docker_client: Any

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Docker refuses a container more cores than there are; a laptop has few."""
        for role in app.roles if ledger.is_ours(app) else ():
            with suppress(Exception):  # no engine: a dry run needs none
                cores = int(self._docker_client.info()["NCPU"])
                role.resource = replace(role.resource, cpu=min(role.resource.cpu, cores))
            if role.max_retries:
                _warn(
                    f"--max_retries {role.max_retries} is left out: Docker would start a container "
                    "again whatever it ended with, and without the others; give --max_restarts, by "
                    "which the agents start the ranks again where that makes sense."
                )
                role.max_retries = 0
            for file in _out_of_reach(role):
                _warn(
                    f"the config file {file} is read again in the container, and no mount brings "
                    "it there; unless the image has it, add --mounts "
                    f"type=bind,src={file},dst={file},readonly"
                )
        return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def describe(self, app_id: str) -> Any:
        """The state of a job; None if it has no containers any more."""
        if not self._get_containers(app_id):  # type: ignore[attr-defined]
            return None
        found = super().describe(app_id)  # type: ignore[misc]
        if found.state.name == "FAILED" and ledger.was_cancelled(self._name(app_id)):
            found.state = type(found.state).CANCELLED
        return found

    def _cancel_existing(self, app_id: str) -> None:
        """Stops all containers at once, and gives each the time that its agent gives its ranks."""
        # First, since whoever waits for the job sees its end as soon as this command does.
        ledger.record_cancel(self._name(app_id))
        containers = self._get_containers(app_id)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(max(1, len(containers))) as pool:
            list(pool.map(_stop, containers))
        self.note_end(app_id, "CANCELLED")  # type: ignore[attr-defined]

    def exit_codes(self, app_id: str) -> list[int]:
        """Of the containers."""
        containers = self._get_containers(app_id)  # type: ignore[attr-defined]
        return [container.attrs["State"]["ExitCode"] for container in containers]

    def _name(self, app_id: str) -> str:
        handle: str = self.handle(app_id)  # type: ignore[attr-defined]
        return handle


def _stop(container: Any) -> None:
    variables = container.attrs["Config"]["Env"] or ()
    container.stop(timeout=round(patience(dict(v.partition("=")[::2] for v in variables))))


def _warn(text: str) -> None:
    print(f"isorun: warning: {text}", file=sys.stderr)


def _out_of_reach(role: Role) -> Iterator[str]:
    """Config files that are not below the working directory, whose copy the image may well have,
    and not in a mount either."""
    mounted = [PurePosixPath(mount.dst_path) for mount in role.mounts]
    for file in _config_files(role.args):
        path = PurePosixPath(file)
        outside = path.is_absolute() or ".." in path.parts
        if outside and not any(path.is_relative_to(directory) for directory in mounted):
            yield file


def _config_files(args: Sequence[str]) -> Iterator[str]:
    words = list(args)
    with suppress(ValueError, TypeError, KeyError, IndexError):  # a sweep has all in its last word
        words += json.loads(words[-1].replace("$$", "$"))["config"]
    for option, value in pairwise(words):
        if option == "--config":
            yield value
