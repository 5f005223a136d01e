"""TorchX's schedulers, watched: what is handed to one is checked first, and recorded after.

A component does not know where its job will go; a scheduler does. So this is where secrets are
kept from remote schedulers, by whatever way a job comes here, and where the launch ledger is
written (``launch.history``). Jobs that are not isorun's pass untouched.

TorchX 0.7.0 forgets its built-in schedulers as soon as one is registered, so all are registered
here, by entry points (group ``torchx.schedulers``) that name this module's attributes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import secrets
from launch.containers import InContainers
from launch.contract import UsageError
from launch.history import ledger
from launch.local import OnThisMachine
from launch.slurm import OnSlurm

if TYPE_CHECKING:
    from torchx.schedulers.api import Scheduler
    from torchx.specs import AppDef

LOCAL = ("local_cwd", "local_docker")
NO_IMAGE = ("local_cwd", "slurm")  # jobs run with what is installed here
MODULES = {
    "local_cwd": "torchx.schedulers.local_scheduler",
    "local_docker": "torchx.schedulers.docker_scheduler",
    "slurm": "torchx.schedulers.slurm_scheduler",
    "kubernetes_job": "launch.kubernetes.scheduler",
    "kubernetes": "torchx.schedulers.kubernetes_scheduler",
    "kubernetes_mcad": "torchx.schedulers.kubernetes_mcad_scheduler",
    "aws_batch": "torchx.schedulers.aws_batch_scheduler",
    "aws_sagemaker": "torchx.schedulers.aws_sagemaker_scheduler",
    "gcp_batch": "torchx.schedulers.gcp_batch_scheduler",
    "ray": "torchx.schedulers.ray_scheduler",
    "lsf": "torchx.schedulers.lsf_scheduler",
}

_MENDED: dict[str, tuple[type, ...]] = {
    "local_cwd": (OnThisMachine,),
    "local_docker": (InContainers,),
    "slurm": (OnSlurm,),
}


class NotInstalledError(UsageError, ModuleNotFoundError):
    """A scheduler's library is not there; TorchX's commands know the second base."""


def __getattr__(name: str) -> Callable[..., Scheduler]:
    """``launch.schedulers:slurm`` for entry points."""
    if name in MODULES:
        return partial(create, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create(name: str, session_name: str, **parameters: Any) -> Scheduler:
    """The scheduler that TorchX knows by this name, watched. Raises NotInstalledError."""
    try:
        module = importlib.import_module(MODULES[name])
        factory = module.create_scheduler
    except (ImportError, AttributeError, NameError) as error:
        # The last is what 0.7.0's module for Ray ends with where Ray is not installed.
        raise NotInstalledError(
            f"The scheduler {name} cannot be used: {str(error).rstrip('.')}; install what it "
            "needs, or choose another by -s."
        ) from None
    scheduler = factory(session_name, **parameters)
    watched: Scheduler = object.__new__(_watched(type(scheduler), name))
    watched.__dict__ = scheduler.__dict__  # it is the same scheduler, under another class
    return watched


def _refuse_commas(env: Mapping[str, str]) -> None:
    """srun is told the environment in one list; what follows a comma would be another variable."""
    for name, value in env.items():
        if "," in value:
            raise UsageError(
                f"{name} is {value!r} in the environment of the job, but Slurm cannot be given a "
                f"value with a comma; leave it out of --env and `export {name}=...` before you "
                "submit, which Slurm hands down."
            )


def _path() -> str:
    """PATH, with the Python first that TorchX itself runs with: a virtual environment may be in
    use without being active."""
    directories = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join(directories)


def _watched(scheduler: type, name: str) -> type:
    """A subclass of a scheduler's class: TorchX asks by isinstance what a scheduler can do."""
    bases = (Watched, *_MENDED.get(name, ()), scheduler)
    return type(f"Watched{scheduler.__name__}", bases, {"known_as": name})


class Watched:
    """What is put before a scheduler's own methods."""

    known_as: str
    session_name: str

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """Checks an app of isorun's before it is rendered. Raises UsageError."""
        for role in app.roles if ledger.is_ours(app) else ():
            if self.known_as in LOCAL:
                role.env = secrets.restore(role.env)
            else:
                secrets.refuse(role.env, self.known_as)
            if self.known_as == "slurm":
                _refuse_commas(role.env)
            if self.known_as in NO_IMAGE:
                role.env.setdefault("PATH", _path())
        return super().submit_dryrun(app, cfg)  # type: ignore[misc]

    def schedule(self, dryrun_info: Any) -> str:
        """Submits, and records it."""
        app_id: str = super().schedule(dryrun_info)  # type: ignore[misc]
        app = getattr(dryrun_info, "app", None) or dryrun_info._app  # 0.7.0 has the latter only
        if ledger.is_ours(app):
            ledger.record_start(self.handle(app_id), self.known_as, app, str(dryrun_info))
        return app_id

    def describe(self, app_id: str) -> Any:
        """The state of a job; if it is final, that is recorded as well."""
        found = super().describe(app_id)  # type: ignore[misc]
        if found is not None and found.state.name in ledger.FINAL:
            self.note_end(app_id, found.state.name, ledger.said(found.msg, found.roles_statuses))
        return found

    def handle(self, app_id: str) -> str:
        """TorchX's name for a job."""
        return f"{self.known_as}://{self.session_name}/{app_id}"

    def note_end(self, app_id: str, state: str, said: ledger.Said | None = None) -> None:
        """Records how a job ended."""
        codes = self.exit_codes(app_id) if hasattr(self, "exit_codes") else []
        ledger.record_end(self.handle(app_id), state, codes, said)
