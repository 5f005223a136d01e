"""What a run says of itself in run.yaml, and changes to that."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.contract import UsageError, did_you_mean

Count = Annotated[int, Field(ge=1)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|[KMGTP]i|[MGTP])?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9./]*[a-z0-9])?$")]


class Spec(BaseModel):
    """The keys of ``spec``; each overlay has those that its components need."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    image: Annotated[str, Field(pattern=r"^\S+$")]
    nodes: Count
    """Pods."""
    processes: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^(auto|gpu|cpu)$")]
    """On each node; auto: one per GPU."""
    command: Annotated[list[str], Field(min_length=1)]
    """What the agent runs, config and overrides included."""
    cpu: Quantity
    """Cores of a node."""
    memory: Quantity
    """Of a node; /dev/shm is a part of it."""
    sharedMemory: Quantity  # noqa: N815 - Kubernetes' way of writing names
    scratch: Quantity
    """Of a node: caches and temporary files."""
    retries: Annotated[int, Field(ge=0)]
    """After failures that are not known to be the machine's fault."""
    gpus: Count | None = None
    minNodes: Count | None = None  # noqa: N815
    queue: Name | None = None
    queuePriority: Name | None = None  # noqa: N815
    topology: Name | None = None
    priorityClass: Name | None = None  # noqa: N815
    efaDevices: Count | None = None  # noqa: N815
    trials: Count | None = None
    parallel: Count | None = None


_WHAT = {
    "image": "an image's name",
    "processes": "a whole number of at least 1, or auto, gpu or cpu",
    "command": "a list of at least one word",
    "retries": "a whole number of at least 0",
    "cpu": "cores, such as 8 or 500m",
    **dict.fromkeys(("memory", "sharedMemory", "scratch"), "an amount, such as 512Mi or 64Gi"),
    **dict.fromkeys(
        ("queue", "queuePriority", "topology", "priorityClass"), "the name of such an object"
    ),
}


@dataclass(frozen=True)
class Change:
    """One value that wins over an overlay's."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Changes:
    """What a launch wants to be different from the overlay."""

    spec: Mapping[str, Change] = field(default_factory=dict)
    name: Change | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None
    stop_deadline: Change | None = None
    """Seconds that ranks have to save."""

    def origin(self, key: str, overlay: str) -> str:
        """Where a value of ``spec`` comes from."""
        change = self.spec.get(key)
        return change.origin if change else f"run.yaml of the overlay {overlay}"


def parse(words: Sequence[str], command: Sequence[str] = ()) -> Changes:
    """``--set KEY=VALUE ...``, and the command that stands after ``--``. Raises UsageError."""
    spec: dict[str, Change] = {}
    env: dict[str, str] = {}
    top: dict[str, Change] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--set must be KEY=VALUE, such as nodes=4, but is {word!r}.")
        origin = f"--set {word}"
        if key.startswith("env."):
            env[key.removeprefix("env.")] = text
        elif key in ("name", "stopDeadline"):
            top[key] = Change(_scalar(text) if key == "stopDeadline" else text, origin)
        elif key in Spec.model_fields:
            spec[key] = Change(_scalar(text), origin)
        else:
            known = [*Spec.model_fields, "name", "stopDeadline", "env.NAME"]
            raise UsageError(
                f"--set {word}: {key} is not a value of a run{did_you_mean(key, known)} The values "
                f"are {', '.join(known)}."
            )
    if command:
        spec["command"] = Change(list(command), "after --")
    return Changes(spec, top.get("name"), env, stop_deadline=top.get("stopDeadline"))


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def apply(
    run: Mapping[str, Any], changes: Changes, wanted: set[str], overlay: str
) -> dict[str, Any]:
    """The document run.yaml with the changes in it, checked; ``wanted`` are the values that some
    component reads. Raises UsageError."""
    spec = {**run["spec"], **{key: change.value for key, change in changes.spec.items()}}
    for key, change in changes.spec.items():
        if key not in wanted:
            raise UsageError(
                f"{key} is {change.value!r} ({change.origin}), but nothing in the overlay "
                f"{overlay} makes use of it; add the component that does, or drop it."
            )
    for key in sorted(wanted - spec.keys()):
        raise UsageError(f"{key} is needed here, but not said; add --set {key}=VALUE.")
    try:
        checked = Spec.model_validate(spec)
    except ValidationError as error:
        raise _explained(error, spec, changes, overlay) from None
    if checked.minNodes is not None and checked.minNodes > checked.nodes:
        raise UsageError(
            f"minNodes is {checked.minNodes}, more than nodes, {checked.nodes}; make it smaller."
        )
    metadata = {**run["metadata"], "name": changes.name.value if changes.name else None}
    metadata["name"] = metadata["name"] or run["metadata"]["name"]
    values = checked.model_dump(exclude_none=True)
    return {**run, "metadata": metadata, "spec": {k: values[k] for k in values if k in wanted}}


def _explained(
    error: ValidationError, spec: Mapping[str, Any], changes: Changes, overlay: str
) -> UsageError:
    key = str(error.errors()[0]["loc"][0])
    origin = changes.origin(key, overlay)
    if key not in Spec.model_fields:
        return UsageError(
            f"{key} is not a value of a run ({origin}){did_you_mean(key, Spec.model_fields)}"
        )
    what = _WHAT.get(key, "a whole number of at least 1")
    return UsageError(f"{key} must be {what}, but is {spec.get(key)!r} ({origin}).")


_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def number(quantity: str | int) -> float:
    """A Kubernetes quantity as a number: bytes or cores."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|([kKMGTP]?)(i?))", str(quantity))
    assert match, quantity
    if match[2] == "m":
        return float(match[1]) / 1000
    base = 1024.0 if match[4] else 1000.0
    return float(match[1]) * base ** _POWERS[match[3].replace("K", "k")]
