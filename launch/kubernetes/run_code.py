"""Brings the code of a submission to its pods: a carrier for the archive, and an init container
that unpacks it before the installed code.

The containers see it read-only, at ``/isorun/code``. The digest is an annotation of the pods, and
the run records it with each attempt.
"""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.agent_command import CODE_NOTES
from launch.contract import CODE_VERSION
from launch.kubernetes import unpack_code
from launch.kubernetes.cluster import CODE_DIGEST
from launch.kubernetes.code_bundle import CodeBundle
from launch.kubernetes.code_carrier import INIT, MOUNTED_PARTS, Carrier
from launch.kubernetes.rendering import Rendered

_PLACE = "/isorun"
_CODE = f"{_PLACE}/code"


def with_code(rendered: Rendered, code: Carrier) -> Rendered:
    """The objects of a run with the ConfigMaps that its pods, patched by ``job_patch``, need, of
    which the first has the program that unpacks the archive. Raises UsageError if the pods cannot
    get the code."""
    name = rendered.workload["metadata"]["name"]
    made: list[dict[str, Any]] = []
    for number, part in enumerate(code.parts):
        metadata: dict[str, Any] = {
            "name": _part_name(name, number),
            "labels": dict(rendered.workload["metadata"].get("labels") or {}),
            "annotations": {CODE_DIGEST: code.bundle.digest},
        }
        made.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True}
        )
        if part:
            data = base64.b64encode(part).decode()
            made[-1]["binaryData"] = {f"part-{number}": data}
    program = Path(unpack_code.__file__).read_text(encoding="utf-8")
    made[0]["data"] = {"unpack.py": program}
    if namespace := rendered.workload["metadata"].get("namespace"):
        for each in made:
            each["metadata"]["namespace"] = namespace
    objects = copy.deepcopy(rendered.objects)
    for policy in _policies(objects):
        policy["rules"] = [rule for each in policy["rules"] for rule in _of_both(each)]
    return code.complete(replace(rendered, objects=[*objects, *made]))


def _policies(made: Any) -> Iterator[dict[str, Any]]:
    """The pod failure policies in objects, which a JobSet and a TrainJob have deep inside."""
    if isinstance(made, dict) and "podFailurePolicy" in made:
        yield made["podFailurePolicy"]
    elif isinstance(made, dict | list):
        for part in made.values() if isinstance(made, dict) else made:
            yield from _policies(part)


def _of_both(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """A rule, and the same one for the init container, whose exit codes have the same meaning. A
    rule without a name would count containers that others inject, too."""
    codes = rule.get("onExitCodes")
    return [rule, {**rule, "onExitCodes": {**codes, "containerName": INIT}}] if codes else [rule]


def job_patch(
    code: Carrier,
    name: str,
    image: str,
    env: Mapping[str, str],
    requests: Mapping[str, str],
    scratch: float,
) -> dict[str, Any]:
    """The patch of the Job with these ConfigMaps. ``env``: the variables of the container;
    ``requests``: its cores and memory, which an init container has in common with it;
    ``scratch``: its ephemeral storage in bytes, to which the code is added."""
    bundle = code.bundle
    sources = [
        {"configMap": {"name": _part_name(name, number)}} for number in range(len(code.parts))
    ]
    directory = _CODE if bundle.directory == "." else f"{_CODE}/{bundle.directory}"
    path = ":".join(filter(None, (directory, *({_CODE} - {directory}), env.get("PYTHONPATH"))))
    space = _space(bundle)
    resources = {**requests, "ephemeral-storage": _mebibytes(space)}
    storage = {"ephemeral-storage": _mebibytes(space + scratch)}
    version = {**bundle.version, "bundle": bundle.digest}
    init = {
        "name": INIT,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-P", f"{MOUNTED_PARTS}/unpack.py"],
        "args": [code.source, _PLACE, bundle.directory, bundle.digest],
        "resources": {"requests": resources, "limits": resources},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "code-parts", "mountPath": MOUNTED_PARTS, "readOnly": True},
            {"name": "code", "mountPath": _PLACE},
            *code.mounts,
        ],
    }
    container = {
        "name": "train",
        "workingDir": directory,
        "resources": {"requests": storage, "limits": storage},
        "env": [
            {"name": "PYTHONPATH", "value": path},
            {"name": CODE_VERSION, "value": json.dumps(version)},
            {"name": CODE_NOTES, "value": f"{_PLACE}/notes"},
        ],
        "volumeMounts": [{"name": "code", "mountPath": _PLACE, "readOnly": True}],
    }
    annotations = {CODE_DIGEST: bundle.digest}
    return {
        "metadata": {"annotations": annotations},
        "spec": {
            "template": {
                "metadata": {"annotations": annotations},
                "spec": {
                    "initContainers": [init],
                    "containers": [container],
                    "volumes": [
                        {"name": "code-parts", "projected": {"sources": sources}},
                        {"name": "code", "emptyDir": {"sizeLimit": _mebibytes(space)}},
                    ],
                },
            }
        },
    }


def _space(bundle: CodeBundle) -> int:
    """Bytes for the files, the archive while they are unpacked, and directories."""
    return (64 << 20) + bundle.size + len(bundle.archive)


def _mebibytes(count: float) -> str:
    return f"{math.ceil(count / 2**20)}Mi"


def _part_name(name: str, number: int) -> str:
    return f"{name}-code-{number}"
