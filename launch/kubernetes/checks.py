"""Finds errors in the objects of a run before they reach a cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import deadlines
from launch.agent.options import parse
from launch.agent_command import agent_arguments, options_of, variable
from launch.contract import (
    STOP_DEADLINE,
    UsageError,
    seconds_in,
    whole_number,
)
from launch.kubernetes import rules
from launch.kubernetes.values import Change, number
from launch.secrets import is_secret, secret_argument

Object = dict[str, Any]
WORKLOADS = ("Job", "JobSet", "TrainJob")
_MAX_HOST_NAME = 63  # characters, also of a label's value
# What each kind puts between the name of the object and the number of the pod.
_INFIX = {"JobSet": "-node-0", "TrainJob": "-node-0", "batch.volcano.sh/v1alpha1": "-node"}


def check(objects: Sequence[Object], asked_deadline: float | None = None) -> list[str]:
    """Raises UsageError for errors, and returns warnings. ``asked_deadline`` is the stop.deadline
    in the run's own config, in seconds."""
    warnings: list[str] = []
    for owner in objects:
        if owner["kind"] in WORKLOADS:
            _host_names(owner)
    for owner, pod in pods(objects):
        for container in pod["containers"]:
            _secrets(owner, container)
            warnings += _image(container["image"])
        _grace(pod, asked_deadline)
        _agent(pod)
        _memory(pod)
    return list(dict.fromkeys(warnings))


def name(given: str, change: Change | None) -> None:
    """Checks the name of a run's objects. Raises UsageError."""
    origin = change.origin if change else "run.yaml"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given):
        raise UsageError(
            f"The name of the run is {given!r} ({origin}), but a name in a cluster has only "
            "lower-case letters, digits and -, and starts with a letter; choose another name."
        )
    if rules.is_yaml_constant(given):
        raise UsageError(
            f"The name of the run is {given!r} ({origin}), which is not a text in YAML; choose "
            "another name."
        )


def namespace(given: str) -> None:
    """Checks the namespace of a run's objects. Raises UsageError."""
    if not rules.LABEL.fullmatch(given):
        raise UsageError(
            f"The namespace is {given!r}, but must have at most 63 lower-case letters, digits and "
            "-, and start and end with a letter or a digit; correct -n (with TorchX: -cfg "
            "namespace)."
        )


_BY_TEMPLATE = {
    "PET_NNODES": "nodes (with TorchX: -j)",
    "PET_NPROC_PER_NODE": "processes (with TorchX: -j)",
    "PET_NODE_RANK": "the index of the pod",
    "PET_RDZV_ENDPOINT": "the name of the run",
    "PET_LOCAL_ADDR": "the address of the pod",
    **dict.fromkeys(("JOB_NAME", "SERVICE", "RDZV_HOST"), "the name of the run"),
    "POD_IP": "the address of the pod",
    "JOB_COMPLETION_INDEX": "the index of the pod",
    "PET_RESTART_DEADLINE": "timeLimit (with TorchX: -cfg time_limit)",
    **dict.fromkeys(("ISORUN_RESTARTED_BY", "ISORUN_RESTARTS"), "the JobSet"),
}
"""Variables that the templates set, and from what."""


def environment(env: Mapping[str, str]) -> None:
    """Checks the environment variables that a launch adds. Raises UsageError."""
    for key, value in env.items():
        where = f"--set env.{key}, with TorchX --env"
        if not rules.VARIABLE.fullmatch(key):
            raise UsageError(
                f"{key!r} is not a name of an environment variable ({where}); use letters, digits, "
                "_, - and ., and no digit at the start."
            )
        if key in _BY_TEMPLATE:
            raise UsageError(
                f"{key} is {value!r} ({where}), but the pods get this variable from "
                f"{_BY_TEMPLATE[key]}; set that instead."
            )
        if "\0" in value:
            raise UsageError(f"{key} has a null character ({where}); remove it.")


def training(command: Sequence[str], world_size: int | None) -> float | None:
    """Checks the config of a training command, unless its files exist only in the image. Returns
    the stop.deadline in the config, if it is set. Raises UsageError."""
    from launch.contract import check_config, config_arguments, load_config

    arguments = config_arguments(command)
    if arguments is None or not all(Path(file).is_file() for file in arguments.config):
        return None
    loaded = load_config(arguments.config, arguments.overrides, runs=False)
    if arguments.command == "fit":  # other commands do not divide the batch
        check_config(loaded.config, loaded.composed, world_size or 1)
    given = loaded.composed.values.get("stop")
    asked = given.get("deadline") if isinstance(given, dict) else None
    return float(asked) if asked is not None else None


def seconds(value: Any, what: str) -> int:
    """A whole number of seconds of at least 1. Raises UsageError."""
    number = whole_number(str(value))
    if not number or number > rules.WEEK:
        raise UsageError(
            f"{what} must be a whole number of seconds of at least 1 and at most {rules.WEEK}, but "
            f"is {str(value)!r}."
        )
    return number


def pods(objects: Sequence[Object]) -> Iterator[tuple[Object, dict[str, Any]]]:
    """The spec of each pod template, with the object that contains it."""
    for owner in objects:
        for template in _templates(owner):
            yield owner, template["spec"]


def _templates(values: Any) -> Iterator[dict[str, Any]]:
    """The pod templates anywhere in an object."""
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
    if len(longest) > _MAX_HOST_NAME:
        raise UsageError(
            f"The name of the run is {given!r}, so the last pod is {longest!r} with "
            f"{len(longest)} characters, but host names have at most {_MAX_HOST_NAME}; choose a "
            f"name that is shorter by {len(longest) - _MAX_HOST_NAME}."
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
        if is_secret(item["name"], str(item.get("value") or "")):
            key = item["name"].lower().replace("_", "-")
            raise UsageError(
                f"The environment variable {item['name']} would be in plain text in the "
                f"{owner['kind']} {owner['metadata']['name']}, readable by everyone who can read "
                "that object; create a Secret (kubectl create secret generic NAME "
                f"--from-literal={key}=...) and refer to it with valueFrom.secretKeyRef, as "
                "k8s/components/wandb-secret does."
            )
    words = [str(word) for key in ("command", "args") for word in container.get(key) or []]
    if argument := secret_argument(words):
        raise UsageError(
            f"The command of the {owner['kind']} {owner['metadata']['name']} has the argument "
            f"{argument!r}, which gives a secret in plain text, readable by everyone who can read "
            "that object; store it in a Secret, from which the pods read it as a variable or a "
            "file."
        )


def _image(image: str) -> list[str]:
    if re.search(r"@sha256:[0-9a-f]{64}$", image):
        return []
    return [
        f"The image {image} has no digest, so its tag may refer to another image when the run "
        "restarts; use NAME@sha256:... (kubectl describe shows it as Image ID)."
    ]


def _grace(pod: dict[str, Any], asked: float | None) -> None:
    """The ranks' deadline, the agent's timeout and the pod's grace period must increase."""
    container = pod["containers"][0]
    env = {item["name"]: item.get("value") or "" for item in container.get("env", [])}
    words = [*container.get("command", []), *container.get("args", [])]
    options = options_of(words, env)
    if options is None:
        return
    pod_seconds = float(pod.get("terminationGracePeriodSeconds", 30))
    agent = options.seconds("shutdown-timeout")
    ranks = seconds_in(env, STOP_DEADLINE, "the pods' environment")
    if ranks is None:
        ranks = deadlines.stop_deadline(agent)
    if asked is not None and asked > ranks:
        raise UsageError(
            f"The run's config has stop.deadline={asked:g}, but in the pods {STOP_DEADLINE} sets "
            f"{ranks:g} s; add --set stopDeadline={math.ceil(asked)} (with TorchX: -cfg "
            f"stop_deadline={math.ceil(asked)})."
        )
    if not deadlines.adds_up(ranks, agent, pod_seconds):
        raise UsageError(
            f"The times for a stop must increase, but the ranks have {ranks:g} s to save a "
            f"checkpoint ({STOP_DEADLINE}), the agent kills them after {agent:g} s "
            f"({variable('shutdown-timeout')}) and needs {deadlines.REPORTS_AFTER_AGENT:g} s to "
            f"report, and the pod is killed after {pod_seconds:g} s "
            "(terminationGracePeriodSeconds); correct the one that is too short."
        )


def _agent(pod: dict[str, Any]) -> None:
    """The values of the agent's options must be those that the agent accepts."""
    container = pod["containers"][0]
    env = {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}
    words = [*container.get("command", []), *container.get("args", [])]
    if not (found := agent_arguments(words)):
        return
    # The number of GPUs and the values of references are known in the pod only.
    reference = re.compile(r"\$\((\w+)\)")
    given = [reference.sub(lambda m: m[0] if m[1] in env else "1", word) for word in found[0]]
    if env.get(processes := variable("nproc-per-node")) in ("auto", "gpu", "cpu"):
        env[processes] = "1"
    parse([*given, "--", *(found[1] or ["python"])], env)


def _memory(pod: dict[str, Any]) -> None:
    limits = pod["containers"][0].get("resources", {}).get("limits", {})
    if "memory" not in limits:
        return
    for volume in pod.get("volumes", []):
        inside = volume.get("emptyDir") or {}
        size = inside.get("sizeLimit")
        if inside.get("medium") == "Memory" and size and number(size) >= number(limits["memory"]):
            raise UsageError(
                f"sharedMemory is {size}, but /dev/shm counts toward memory, which is "
                f"{limits['memory']}: a process that fills it would be killed; make sharedMemory "
                "smaller than memory."
            )
