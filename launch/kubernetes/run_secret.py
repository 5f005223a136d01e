"""The secret with which the pods of a submitted run sign their messages (docs/security.md)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from launch.agent_command import variable
from launch.contract import SECRET, SECRET_FILE, new_secret
from launch.kubernetes import checks
from launch.kubernetes.rendering import Object, Rendered

_KEY = "key"
_NNODES = variable("nnodes")


def with_secret(rendered: Rendered) -> Rendered:
    """The objects of a run, with a new Secret from which its pods read ISORUN_SECRET. The same
    objects if the pods have one from elsewhere, or no other node to sign messages for.

    The kubelet starts no container before the Secret exists.
    """
    workload = copy.deepcopy(rendered.workload)
    containers = [
        container
        for _, pod in checks.pods([workload])
        for container in pod["containers"]
        if _joins_others(container.get("env", []))
    ]
    if not containers:
        return rendered
    name, labels = workload["metadata"]["name"], workload["metadata"].get("labels") or {}
    source = {"secretKeyRef": {"name": name, "key": _KEY}}
    for container in containers:
        container["env"].append({"name": SECRET, "valueFrom": source})
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": dict(labels)},
        "immutable": True,
        "stringData": {_KEY: new_secret({})[SECRET]},
    }
    others = [made for made in rendered.objects if made is not rendered.workload]
    return replace(rendered, objects=[*others, workload, secret])


def _joins_others(env: Sequence[Object]) -> bool:
    """Whether a container with these variables is one of several nodes, and has no secret."""
    values = {given["name"]: given.get("value", "") for given in env}
    most = str(values.get(_NNODES, "1")).rpartition(":")[2]
    return most != "1" and SECRET not in values and SECRET_FILE not in values
