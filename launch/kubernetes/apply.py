"""Applies the objects of a run with kubectl.

Kubeflow Trainer's webhook refuses a TrainJob whose TrainingRuntime is not in the trainer's cache,
which is filled a moment after the API server has it. Nothing in a manifest makes kubectl wait for
that, so a single `kubectl apply` of both may fail.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from launch.contract import RetryError, UsageError
from launch.kubernetes import rules
from launch.kubernetes.kustomize import kubectl
from launch.kubernetes.rendering import as_yaml
from launch.torchx.refusals import command_refusal

_POLL = 1.0
_UNNOTICED = re.compile(r"trainingruntime.*(must be created before|not found)", re.I | re.S)


def apply(objects: Sequence[dict[str, Any]]) -> None:
    """Applies them, a TrainJob when its runtime is known; kubectl prints what it has made. Raises
    UsageError or RetryError."""
    last = [made for made in objects if made["kind"] == "TrainJob"]
    if others := [made for made in objects if made["kind"] != "TrainJob"]:
        _apply(others)
    until = time.monotonic() + rules.RUNTIME_SECONDS
    while last:
        try:
            return _apply(last)
        except UsageError as error:
            if not _UNNOTICED.search(str(error)) or time.monotonic() > until:
                raise
        time.sleep(_POLL)
    return None


def _apply(objects: Sequence[dict[str, Any]]) -> None:
    done = subprocess.run(
        [*kubectl(), "apply", "--filename", "-"], input=as_yaml(objects), text=True,
        stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode:
        refusal = command_refusal("kubectl", done.stderr, "correct what it names")
        error = RetryError if refusal.later else UsageError
        raise error(f"The objects could not be applied: {refusal.reason}; {refusal.advice}.")
