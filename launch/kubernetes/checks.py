"""What can be known to be wrong before a cluster has seen anything."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch import deadlines
from launch.contract import STOP_DEADLINE, UsageError
from launch.kubernetes.values import number
from launch.secrets import is_secret

Object = dict[str, Any]
WORKLOADS = ("Job", "JobSet", "TrainJob")
_LONGEST = 63  # of a label's value and of a host's name
_INFIX = {"JobSet": "-node-0", "TrainJob": "-node-0", "batch.volcano.sh/v1alpha1": "-node"}


def check(objects: Sequence[Object], asked_deadline: float | None = None) -> list[str]:
    """Raises UsageError for what cannot work, returns warnings of what may not;
    ``asked_deadline`` is the stop.deadline that the run's own config asks for, in seconds."""
    warnings: list[str] = []
    for owner in objects:
        if owner["kind"] in WORKLOADS:
            _host_names(owner)
    for owner, pod in pods(objects):
        for container in pod["containers"]:
            _secrets(owner, container)
            warnings += _image(container["image"])
        _grace(pod, asked_deadline)
        _memory(pod)
    return list(dict.fromkeys(warnings))


def name(given: str) -> None:
    """That objects of the cluster may be called this. Raises UsageError."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given):
        raise UsageError(
            f"The name of the run is {given!r}, but in a cluster names consist of lower-case "
            "letters, digits and -, a letter first; choose another."
        )


def training(command: Sequence[str], world_size: int | None) -> float | None:
    """Checks the config of a training command by the training's own schema, if it can be read
    here: its files may be in the image only. Returns the stop.deadline that it asks for, if it
    does. Raises UsageError."""
    from launch.contract import check_config, training_config

    if not all(Path(word).is_file() for word in _files(command)):
        return None
    loaded = training_config(command)
    if loaded is None:
        return None
    if ("train", "fit") in pairwise(command):  # only training shares a batch out
        check_config(loaded.config, loaded.composed, world_size or 1)
    said = loaded.composed.values.get("stop")
    asked = said.get("deadline") if isinstance(said, dict) else None
    return float(asked) if asked is not None else None


def _files(words: Sequence[str]) -> list[str]:
    return [after for word, after in pairwise(words) if word == "--config"]


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
    infix = _INFIX.get(owner["kind"]) or _INFIX.get(owner["apiVersion"], "")
    longest = f"{given}{infix}-{_pods_of(owner) - 1}"
    if len(longest) > _LONGEST:
        raise UsageError(
            f"The name of the run is {given!r}, which makes the last pod {longest!r}, of "
            f"{len(longest)} characters, but host names have at most {_LONGEST}; choose one "
            f"that is {len(longest) - _LONGEST} shorter."
        )


def _pods_of(owner: Object) -> int:
    spec = owner["spec"]
    if owner["kind"] == "TrainJob":
        return int(spec["trainer"]["numNodes"])
    if owner["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return int(spec["tasks"][0]["replicas"] if "tasks" in spec else spec["completions"])


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


def _grace(pod: dict[str, Any], asked: float | None) -> None:
    """Ranks save, the agent reports, the pod ends: each must have longer than the one before."""
    container = pod["containers"][0]
    env = {item["name"]: item.get("value") for item in container.get("env", [])}
    words = [*container.get("command", []), *container.get("args", [])]
    if "launch.agent" not in words:
        return
    pod_seconds = float(pod.get("terminationGracePeriodSeconds", 30))
    said = _option(words, "--shutdown-timeout") or env.get("PET_SHUTDOWN_TIMEOUT")
    agent = float(said or deadlines.SHUTDOWN_TIMEOUT)
    ranks = float(env.get(STOP_DEADLINE) or deadlines.stop_deadline(agent))
    if asked is not None and asked > ranks:
        raise UsageError(
            f"The run asks for stop.deadline={asked:g}, but pods give ranks {ranks:g} s to save "
            "(ISORUN_STOP_DEADLINE, which wins); say so here as well: --set stopDeadline="
            f"{math.ceil(asked)} (with TorchX: -cfg stop_deadline={math.ceil(asked)})."
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
