"""What can be known to be wrong before a cluster has seen anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from launch.kubernetes.values import number
from launch.secrets import is_secret
from train.exits import UsageError

Object = dict[str, Any]
WORKLOADS = ("Job", "JobSet", "TrainJob")
_LONGEST = 63  # of a label's value and of a host's name
_INFIX = {"JobSet": "-node-0", "TrainJob": "-node-0", "batch.volcano.sh/v1alpha1": "-node"}


def check(objects: Sequence[Object]) -> list[str]:
    """Raises UsageError for what cannot work, returns warnings of what may not."""
    warnings: list[str] = []
    for owner, pod in pods(objects):
        _host_names(owner)
        for container in pod["containers"]:
            _secrets(owner, container)
            warnings += _image(container["image"])
        _grace(pod)
        _memory(pod)
    return list(dict.fromkeys(warnings))


def name(given: str) -> None:
    """That objects of the cluster may be called this. Raises UsageError."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given):
        raise UsageError(
            f"The name of the run is {given!r}, but in a cluster names consist of lower-case "
            "letters, digits and -, a letter first; choose another."
        )


def seconds(value: Any, what: str) -> int:
    """A whole number of seconds, at least one. Raises UsageError."""
    text = str(value)
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{what} must be whole seconds, at least 1, but is {text!r}.")
    return int(text)


def pods(objects: Sequence[Object]) -> Iterator[tuple[Object, dict[str, Any]]]:
    """Every pod that would come of these objects, with the object that makes it."""
    for owner in objects:
        for template in _templates(owner):
            yield owner, template["spec"]


def _templates(values: Any) -> Iterator[dict[str, Any]]:
    """Whatever looks like a pod template, wherever an object keeps it."""
    if isinstance(values, dict):
        spec = values.get("spec")
        if isinstance(spec, dict) and "containers" in spec:
            yield values
        else:
            for inner in values.values():
                yield from _templates(inner)
    elif isinstance(values, list):
        for inner in values:
            yield from _templates(inner)


def _host_names(owner: Object) -> None:
    given = owner["metadata"]["name"]
    spec = owner["spec"]
    tasks = spec.get("tasks") or [{}]
    count = int(spec.get("completions") or tasks[0].get("replicas") or _replicated(spec) or 1)
    infix = _INFIX.get(owner["kind"]) or _INFIX.get(owner["apiVersion"], "")
    longest = f"{given}{infix}-{count - 1}"
    if len(longest) > _LONGEST:
        raise UsageError(
            f"The name of the run is {given!r}, which makes the last pod {longest!r}, of "
            f"{len(longest)} characters, but host names have at most {_LONGEST}; choose one "
            f"that is {len(longest) - _LONGEST} shorter."
        )


def _replicated(spec: dict[str, Any]) -> int | None:
    jobs = spec.get("replicatedJobs")
    found = jobs[0]["template"]["spec"].get("completions") if jobs else None
    return int(found) if found else None


def _secrets(owner: Object, container: dict[str, Any]) -> None:
    for item in container.get("env", []):
        if is_secret(item["name"]) and item.get("value"):
            key = item["name"].lower().replace("_", "-")
            raise UsageError(
                f"The environment variable {item['name']} would stand in plain text in the "
                f"{owner['kind']} {owner['metadata']['name']}, for all to read who may look at "
                "it; put it into a Secret (kubectl create secret generic NAME "
                f"--from-literal={key}=...) and refer to that by valueFrom.secretKeyRef, as "
                "k8s/components/wandb-secret does."
            )


def _image(image: str) -> list[str]:
    if re.search(r"@sha256:[0-9a-f]{64}$", image):
        return []
    return [
        f"The image {image} has no digest: its tag may come to mean another image between two "
        "starts of one run; name it as NAME@sha256:... (kubectl describe shows it as Image ID)."
    ]


def _grace(pod: dict[str, Any]) -> None:
    """Ranks save, the agent reports, the pod ends: each must have longer than the one before."""
    container = pod["containers"][0]
    env = {item["name"]: item.get("value") for item in container.get("env", [])}
    words = [*container.get("command", []), *container.get("args", [])]
    if "launch.agent" not in words:
        return
    pod_seconds = float(pod.get("terminationGracePeriodSeconds", 30))
    agent = float(_option(words, "--shutdown-timeout") or env.get("PET_SHUTDOWN_TIMEOUT") or 35)
    ranks = float(env.get("ISORUN_STOP_DEADLINE") or agent - 5)
    asked = next((w for w in reversed(words) if w.startswith("stop.deadline=")), None)
    if asked:
        value = asked.partition("=")[2]
        if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) > ranks:
            raise UsageError(
                f"The run asks for {asked}, but pods give ranks {ranks:g} s to save "
                f"(ISORUN_STOP_DEADLINE, which wins); say so here as well: --set stopDeadline="
                f"{value if value.isdigit() else 'SECONDS'} (with TorchX: -cfg stop_deadline=...)."
            )
    if not pod_seconds > agent > ranks:
        raise UsageError(
            f"A stop would be cut off: ranks have {ranks:g} s to save (ISORUN_STOP_DEADLINE), "
            f"the agent waits {agent:g} s for them (PET_SHUTDOWN_TIMEOUT), and the pod is killed "
            f"after {pod_seconds:g} s (terminationGracePeriodSeconds); each must be longer than "
            "the one before."
        )


def _option(words: Sequence[str], option: str) -> str | None:
    for at, word in enumerate(words):
        if word == "--":
            continue
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and at + 1 < len(words):
            return words[at + 1]
    return None


def _memory(pod: dict[str, Any]) -> None:
    limits = pod["containers"][0].get("resources", {}).get("limits", {})
    if "memory" not in limits:
        return
    for volume in pod.get("volumes", []):
        inside = volume.get("emptyDir") or {}
        size = inside.get("sizeLimit")
        if inside.get("medium") == "Memory" and size and number(size) >= number(limits["memory"]):
            raise UsageError(
                f"sharedMemory is {size}, but it is a part of memory, which is "
                f"{limits['memory']}: a process that fills it would be killed; make it smaller."
            )
