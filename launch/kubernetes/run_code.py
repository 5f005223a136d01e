"""Brings the code of a submission to its pods: ConfigMaps with the archive, and an init container
that unpacks it before the installed code.

The containers see it read-only, at ``/isorun/code``. The digest is an annotation of the pods, and
the run records it with each attempt.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.agent_command import CODE_NOTES
from launch.contract import CODE_VERSION
from launch.kubernetes import unpack_code
from launch.kubernetes.cluster import CODE_DIGEST
from launch.kubernetes.code_bundle import CodeBundle
from launch.kubernetes.rendering import Rendered

_PLACE = "/isorun"
_CODE = f"{_PLACE}/code"
_PARTS = "/isorun-parts"


def with_code(rendered: Rendered, bundle: CodeBundle) -> Rendered:
    """The objects of a run with the ConfigMaps that its pods, patched by ``job_patch``, need. The
    first of them also has the program that unpacks the archive."""
    name = rendered.workload["metadata"]["name"]
    made: list[dict[str, Any]] = []
    for number, part in enumerate(bundle.parts):
        metadata: dict[str, Any] = {
            "name": _part_name(name, number),
            "labels": dict(rendered.workload["metadata"].get("labels") or {}),
            "annotations": {CODE_DIGEST: bundle.digest},
        }
        data = {f"part-{number}": base64.b64encode(part).decode()}
        made.append(
            {
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
                "immutable": True, "binaryData": data,
            }
        )  # fmt: skip
    program = Path(unpack_code.__file__).read_text(encoding="utf-8")
    made[0]["data"] = {"unpack.py": program}
    if namespace := rendered.workload["metadata"].get("namespace"):
        for each in made:
            each["metadata"]["namespace"] = namespace
    return replace(rendered, objects=[*rendered.objects, *made])


def job_patch(
    bundle: CodeBundle, name: str, image: str, env: Mapping[str, str], requests: Mapping[str, str]
) -> dict[str, Any]:
    """The patch of the Job with these ConfigMaps. ``env``: the variables of the container;
    ``requests``: its cores and memory, which an init container has in common with it."""
    sources = [
        {"configMap": {"name": _part_name(name, number)}} for number in range(len(bundle.parts))
    ]
    directory = _CODE if bundle.directory == "." else f"{_CODE}/{bundle.directory}"
    path = ":".join(filter(None, (directory, *({_CODE} - {directory}), env.get("PYTHONPATH"))))
    resources = {**requests, "ephemeral-storage": _limit(bundle)}
    version = {**bundle.version, "bundle": bundle.digest}
    init = {
        "name": "code",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-P", f"{_PARTS}/unpack.py"],
        "args": [_PARTS, _PLACE, bundle.directory, bundle.digest],
        "resources": {"requests": resources, "limits": resources},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "code-parts", "mountPath": _PARTS, "readOnly": True},
            {"name": "code", "mountPath": _PLACE},
        ],
    }
    container = {
        "name": "train",
        "workingDir": directory,
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
                        {"name": "code", "emptyDir": {"sizeLimit": _limit(bundle)}},
                    ],
                },
            }
        },
    }


def _limit(bundle: CodeBundle) -> str:
    """Space for the files, each of which takes whole blocks, and for what is compiled from them."""
    return f"{64 + (3 * bundle.size >> 20)}Mi"


def _part_name(name: str, number: int) -> str:
    return f"{name}-code-{number}"
