"""What all schedulers have in common: checks before a submission, and a launch log after it."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from launch import secrets
from launch.contract import IMAGE, SUBMITTED_AT, UsageError, safe_path_options
from launch.history import launch_log
from launch.history.image import image_digest
from launch.torchx import options
from launch.torchx.refusals import refusals

if TYPE_CHECKING:
    from torchx.schedulers.api import Scheduler
    from torchx.specs import AppDef, Role

LOCAL = ("local_cwd", "local_docker")
NAMES_IMAGE = ("kubernetes_job",)  # its templates tell the ranks which image they run in
NO_IMAGE = ("local_cwd", "slurm")  # jobs use the packages installed here, not an image


class Recorded:
    """How a scheduler's jobs are entered in the launch log. A mixin of TorchX's classes."""

    known_as: str
    """The scheduler's name in TorchX."""
    session_name: str

    def handle(self, app_id: str) -> str:
        """The app handle, TorchX's name for a job."""
        return f"{self.known_as}://{self.session_name}/{app_id}"

    def exit_codes(self, app_id: str) -> Sequence[int]:
        """The exit codes of a job's nodes; empty if the scheduler cannot tell them."""
        of_scheduler = getattr(super(), "exit_codes", None)
        return cast("Sequence[int]", of_scheduler(app_id)) if of_scheduler else []

    def note_end(
        self, app_id: str, state: str, status: launch_log.StatusText | None = None
    ) -> None:
        """Records the end of a job."""
        codes = list(self.exit_codes(app_id))
        launch_log.record_end(self.handle(app_id), state, codes, status)


class Watched(Recorded):
    """Comes before the scheduler among the bases of a class."""

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Checks and completes an app of isorun before it is rendered. Raises UsageError."""
        options.refuse_unknown(cfg, self.run_opts(), self.known_as, "scheduler options")  # type: ignore[attr-defined]
        for role in app.roles if launch_log.is_ours(app) else ():
            _refuse_impossible(role, self.known_as)
            role.env.setdefault(SUBMITTED_AT, f"{time.time():.3f}")
            if self.known_as in LOCAL:
                role.env = secrets.restore(role.env)
            else:
                secrets.refuse(role.env, role.args, self.known_as)
            installed_here = self.known_as in NO_IMAGE
            if self.known_as not in NAMES_IMAGE and not installed_here:
                role.env.setdefault(IMAGE, _with_digest(role.image, self.known_as))
            if installed_here:
                role.env.setdefault("PATH", _path())
            if role.args[:1] == ["-m"]:  # the job's directory may contain a launch.py
                role.args = [*(safe_path_options() if installed_here else ["-P"]), *role.args]
        with refusals(f"prepare the job for {self.known_as}"):
            return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def schedule(self, dryrun_info: Any) -> str:
        """Submits, and records the launch."""
        with refusals(f"submit the job to {self.known_as}"):
            app_id: str = super().schedule(dryrun_info)  # type: ignore[misc]
        app = getattr(dryrun_info, "app", None) or dryrun_info._app  # TorchX 0.7.0 has only _app
        if launch_log.is_ours(app):
            launch_log.record_start(
                self.handle(app_id),
                self.known_as,
                app,
                str(dryrun_info),
                # Only local_cwd's request has one.
                log_directory=getattr(dryrun_info.request, "log_dir", None),
            )
        return app_id

    def describe(self, app_id: str) -> Any:
        """The state of a job; a final one is recorded."""
        with refusals(f"read the state of {self.handle(app_id)}"):
            found = super().describe(app_id)  # type: ignore[misc]
        if found is not None and found.state.name in launch_log.FINAL:
            status = launch_log.StatusText.of(found.msg, found.roles_statuses)
            self.note_end(app_id, found.state.name, status)
        return found

    def list(self, *cfg: Any) -> Any:
        """The jobs."""
        with refusals(f"list the jobs of {self.known_as}"):
            return super().list(*cfg)  # type: ignore[misc]

    def _cancel_existing(self, app_id: str) -> None:
        with refusals(f"stop {self.handle(app_id)}"):
            super()._cancel_existing(app_id)  # type: ignore[misc]

    def log_iter(self, app_id: str, *rest: Any, **more: Any) -> Any:
        """The lines of a log."""
        with refusals(f"read the log of {self.handle(app_id)}"):
            return super().log_iter(app_id, *rest, **more)  # type: ignore[misc]


def watched(scheduler: type[Scheduler], name: str) -> type[Scheduler]:
    """The watched subclass of a scheduler. It is a subclass, not a wrapper, since TorchX asks by
    isinstance what a scheduler supports."""
    return type(f"Watched{scheduler.__name__}", (Watched, scheduler), {"known_as": name})


def instance_of(
    scheduler: type[Scheduler],
    factory: Callable[..., Scheduler],
    session_name: str,
    parameters: Mapping[str, Any],
) -> Scheduler:
    """An instance, made with the arguments that TorchX's own factory would pass: those in its
    signature, with its defaults. Other parameters belong to other schedulers."""
    signature = inspect.signature(factory)
    call = signature.bind(session_name, **parameters)
    call.apply_defaults()
    return scheduler(
        **{
            name: value
            for name, value in call.arguments.items()
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        }
    )


def _refuse_impossible(role: Role, scheduler: str) -> None:
    if scheduler == "aws_batch" and role.num_replicas > 1:
        raise UsageError(
            f"-j requests {role.num_replicas} nodes, but isorun supports one node with aws_batch, "
            "which gives a node neither its number nor the address of node 0; use one node, or "
            "kubernetes_job or slurm for several."
        )


def _with_digest(image: str, scheduler: str) -> str:
    """The image with the digest that Docker on this machine has for it, if it runs there."""
    digest = image_digest(image) if scheduler == "local_docker" and "@" not in image else None
    return f"{image}@{digest}" if digest and digest not in image else image


def _path() -> str:
    """PATH, starting with the directory of the Python that runs TorchX: its virtual environment
    need not be activated."""
    directories = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join(directories)
