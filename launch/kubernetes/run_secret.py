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
    made = copy.deepcopy(rendered.objects)
    workload = made[rendered.objects.index(rendered.workload)]
    runtimes = [each for each in made if each["kind"] == "TrainingRuntime"]
    nodes = str(workload["spec"].get("trainer", {}).get("numNodes", 1))
    containers = [
        container
        for _, pod in checks.pods([workload, *runtimes])
        for container in pod["containers"]
        if _joins_others(container.get("env", []), nodes)
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
    return replace(rendered, objects=[*made, secret])


def _joins_others(env: Sequence[Object], nodes: str) -> bool:
    """Whether a container with these variables is one of several nodes, and has no secret.
    ``nodes``: their number, unless the variables have it."""
    values = {given["name"]: given.get("value", "") for given in env}
    most = str(values.get(_NNODES, nodes)).rpartition(":")[2]
    return most != "1" and SECRET not in values and SECRET_FILE not in values
