"""TorchX's schedulers, with isorun's checks and launch log.

A component does not know which scheduler gets its job; the scheduler does. So this is where secrets
are kept from remote schedulers and where launches are recorded (``launch.history``). Jobs that are
not isorun's pass unchanged.

TorchX 0.7.0 hides its built-in schedulers as soon as a package registers one, so all of them are
registered here, by entry points (group ``torchx.schedulers``) that name attributes of this module.

watched                               ->  what all schedulers have in common
{local,docker,slurm}_scheduler        ->  TorchX's, with the corrections that isorun's jobs need
requeue                               ->  ``python -m launch.requeue``, which runs in Slurm jobs

A module here must not have the name of a scheduler: it would hide the entry point's attribute.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError

if TYPE_CHECKING:
    from torchx.schedulers.api import Scheduler

# TorchX's name of each scheduler, its module, and its class.
SCHEDULERS = {
    "local_cwd": ("launch.torchx.schedulers.local_scheduler", "LocalCwdScheduler"),
    "local_docker": ("launch.torchx.schedulers.docker_scheduler", "LocalDockerScheduler"),
    "slurm": ("launch.torchx.schedulers.slurm_scheduler", "RequeueingSlurmScheduler"),
    "kubernetes_job": ("launch.kubernetes.scheduler", "KubernetesJobScheduler"),
    "kubernetes": ("torchx.schedulers.kubernetes_scheduler", "KubernetesScheduler"),
    "kubernetes_mcad": ("torchx.schedulers.kubernetes_mcad_scheduler", "KubernetesMCADScheduler"),
    "aws_batch": ("torchx.schedulers.aws_batch_scheduler", "AWSBatchScheduler"),
    "aws_sagemaker": ("torchx.schedulers.aws_sagemaker_scheduler", "AWSSageMakerScheduler"),
    "gcp_batch": ("torchx.schedulers.gcp_batch_scheduler", "GCPBatchScheduler"),
    "ray": ("torchx.schedulers.ray_scheduler", "RayScheduler"),
    "lsf": ("torchx.schedulers.lsf_scheduler", "LsfScheduler"),
}


class NotInstalledError(UsageError, ModuleNotFoundError):
    """A package that a scheduler needs is missing. TorchX's commands handle ModuleNotFoundError."""


def __getattr__(name: str) -> Callable[..., Scheduler]:
    """``launch.torchx.schedulers:slurm`` for entry points."""
    if name in SCHEDULERS:
        return partial(create, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create(name: str, session_name: str, **parameters: Any) -> Scheduler:
    """A scheduler by TorchX's name for it. TorchX passes the parameters of all schedulers to each
    of them. Raises NotInstalledError."""
    module_name, class_name = SCHEDULERS[name]
    try:
        module = importlib.import_module(module_name)
        scheduler, factory = getattr(module, class_name), module.create_scheduler
    except (ImportError, AttributeError, NameError) as error:
        # The last two: TorchX's module for Ray without Ray.
        raise NotInstalledError(
            f"The scheduler {name} is not available: {str(error).rstrip('.')}; install the missing "
            "package, or choose another scheduler with -s."
        ) from None
    from launch.torchx.schedulers.watched import instance_of, watched

    return instance_of(watched(scheduler, name), factory, session_name, parameters)
