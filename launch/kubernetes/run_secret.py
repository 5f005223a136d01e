"""The secret with which the pods of a submitted run sign their messages (docs/security.md)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from launch.agent_command import variable
from launch.contract import SECRET, SECRET_FILE, new_secret
from launch.kubernetes import checks

Object = dict[str, Any]
_KEY = "key"
_NNODES = variable("nnodes")


def with_secret(objects: Sequence[Object], workload: Object) -> list[Object]:
    """The objects of a run, with a new Secret from which its pods read ISORUN_SECRET. The same
    objects if the pods have one from elsewhere, or no other node to sign messages for.

    The kubelet starts no container before the Secret exists.
    """
    name = workload["metadata"]["name"]
    changed = copy.deepcopy(list(objects))
    containers = [
        container
        for owner, pod in checks.pods(changed)
        if owner["metadata"]["name"] == name and owner["kind"] == workload["kind"]
        for container in pod["containers"]
        if _joins_others(container.get("env", []))
    ]
    if not containers:
        return list(objects)
    source = {"secretKeyRef": {"name": name, "key": _KEY}}
    for container in containers:
        container["env"].append({"name": SECRET, "valueFrom": source})
    return [
        *changed,
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": dict(workload["metadata"].get("labels") or {})},
            "immutable": True,
            "stringData": {_KEY: new_secret({})[SECRET]},
        },
    ]


def _joins_others(env: Sequence[Object]) -> bool:
    """Whether a container with these variables is one of several nodes, and has no secret."""
    values = {given["name"]: given.get("value", "") for given in env}
    most = str(values.get(_NNODES, "1")).rpartition(":")[2]
    return most != "1" and SECRET not in values and SECRET_FILE not in values
