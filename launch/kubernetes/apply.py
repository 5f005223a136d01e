"""Applies the objects of a run with kubectl.

Nothing in a manifest makes kubectl wait until Kubeflow Trainer has noticed a TrainingRuntime, so a
single `kubectl apply` of it and its TrainJob may fail.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Any

from launch.contract import RetryError, UsageError
from launch.kubernetes import trainer
from launch.kubernetes.kustomize import kubectl
from launch.kubernetes.rendering import as_yaml
from launch.torchx.refusals import command_refusal

_UNNOTICED = re.compile(r"trainingruntime.*(must be created before|not found)", re.I | re.S)


def apply(objects: Sequence[dict[str, Any]]) -> None:
    """Applies them, a TrainJob when its runtime is known; kubectl prints what it has made. Raises
    UsageError or RetryError."""
    last = [made for made in objects if made["kind"] == "TrainJob"]
    if others := [made for made in objects if made["kind"] != "TrainJob"]:
        _apply(others)
    if last:
        trainer.when_noticed(lambda: _apply(last), _UNNOTICED.search)


def _apply(objects: Sequence[dict[str, Any]]) -> None:
    done = subprocess.run(
        [*kubectl(), "apply", "--filename", "-"], input=as_yaml(objects), text=True,
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode:
        refusal = command_refusal("kubectl", done.stderr, "correct what it names")
        error = RetryError if refusal.later else UsageError
        raise error(f"The objects could not be applied: {refusal.reason}; {refusal.advice}.")
