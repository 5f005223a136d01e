"""The values of a run in run.yaml, and changes to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from launch.contract import UsageError, did_you_mean
from launch.kubernetes import rules


def _whole(value: Any) -> Any:
    """YAML's true and 2.0 are no whole numbers here."""
    if isinstance(value, bool | float):
        raise ValueError
    return value


def _is(rule: re.Pattern[str], longest: int = 253) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) > longest or not rule.fullmatch(text):
            raise ValueError
        return text

    return AfterValidator(check)


def _at_least(least: float) -> AfterValidator:
    def check(text: str) -> str:
        if number(text) < least:
            raise ValueError
        return text

    return AfterValidator(check)


Pods = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=rules.MOST_PODS)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=rules.MOST)]
Seconds = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=rules.MOST_SECONDS)]
Retries = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=rules.MOST)]
Cores = Annotated[str, _is(rules.CORES), _at_least(0.001)]
Bytes = Annotated[str, _is(rules.BYTES), _at_least(2**20)]
Name = Annotated[str, _is(rules.SUBDOMAIN)]
LabelName = Annotated[str, _is(rules.SUBDOMAIN, 63)]


class Spec(BaseModel):
    """The keys of ``spec``; each overlay has those that its components read."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    image: Annotated[str, _is(rules.IMAGE, 512)]
    nodes: Pods
    """Number of pods."""
    processes: Pods | Annotated[str, Field(pattern=r"^(auto|gpu|cpu)$")]
    """Ranks per node; auto: one per GPU."""
    command: Annotated[list[str], Field(min_length=1)]
    """The command of the agent, with config files and overrides."""
    cpu: Cores
    """Cores per node."""
    memory: Bytes
    """Per node; /dev/shm counts toward it."""
    sharedMemory: Bytes  # noqa: N815 - the spelling of Kubernetes
    scratch: Bytes
    """Per node: space for caches and temporary files."""
    retries: Retries
    """Restarts after failures that are not infrastructure failures."""
    gpus: Count | None = None
    minNodes: Pods | None = None  # noqa: N815
    queue: LabelName | None = None
    queuePriority: LabelName | None = None  # noqa: N815
    topology: Annotated[str, _is(rules.QUALIFIED, 317)] | None = None
    priorityClass: Name | None = None  # noqa: N815
    efaDevices: Count | None = None  # noqa: N815
    timeLimit: Seconds | None = None  # noqa: N815
    """After which a Job, an attempt of a JobSet, and the restarts of a JobSet end."""
    trials: Pods | None = None
    parallel: Pods | None = None


TORCHX_OPTIONS = {
    "cpu": "cpu",
    "queue": "queue",
    "queue_priority": "queuePriority",
    "topology": "topology",
    "priority_class": "priorityClass",
    "time_limit": "timeLimit",
    "shared_memory": "sharedMemory",
    "scratch": "scratch",
}
"""Options of the scheduler kubernetes_job, and the values of run.yaml that they set."""

_WHAT = {
    "image": "the name of an image, in lower-case letters but for the tag",
    "processes": "a whole number of at least 1, or auto, gpu or cpu",
    "command": "a list with at least one word",
    "retries": f"a whole number of at least 0 and at most {rules.MOST}",
    "cpu": "a number of cores above 0, such as 8 or 500m",
    **dict.fromkeys(
        ("memory", "sharedMemory", "scratch"),
        "a quantity of bytes of at least 1Mi, such as 512Mi or 64Gi",
    ),
    **dict.fromkeys(
        ("queue", "queuePriority"),
        "the name of an object: at most 63 lower-case letters, digits, - and .",
    ),
    "priorityClass": "the name of an object: lower-case letters, digits, - and .",
    "topology": "the key of a label, such as topology.kubernetes.io/zone",
    "timeLimit": f"a whole number of seconds of at least 1 and at most {rules.MOST_SECONDS}",
    **dict.fromkeys(("gpus", "efaDevices"), "a whole number of at least 1"),
}
_WHAT_PODS = f"a whole number of at least 1 and at most {rules.MOST_PODS}"


@dataclass(frozen=True)
class Change:
    """A value that overrides the overlay's."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Changes:
    """What a launch changes in an overlay."""

    spec: Mapping[str, Change] = field(default_factory=dict)
    name: Change | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None
    stop_deadline: Change | None = None
    """Seconds that ranks have to save a checkpoint at a stop."""

    def origin(self, key: str, overlay: str) -> str:
        """The origin of a value of ``spec``, for error messages."""
        change = self.spec.get(key)
        return change.origin if change else f"run.yaml of the overlay {overlay}"


def parse(words: Sequence[str], command: Sequence[str] = ()) -> Changes:
    """Parses ``--set KEY=VALUE ...``; ``command`` is what follows ``--``. Raises UsageError."""
    spec: dict[str, Change] = {}
    env: dict[str, str] = {}
    top: dict[str, Change] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--set must be KEY=VALUE, such as nodes=4, but is {word!r}.")
        origin = f"--set {word}"
        if key.startswith("env.") and key != "env.":
            env[key.removeprefix("env.")] = text
        elif key in ("name", "stopDeadline"):
            top[key] = Change(_scalar(text) if key == "stopDeadline" else text, origin)
        elif key in Spec.model_fields:
            spec[key] = Change(_scalar(text), origin)
        else:
            known = [*Spec.model_fields, "name", "stopDeadline", "env.NAME"]
            raise UsageError(
                f"--set {word}: {key} is not a key{did_you_mean(key, known)} The keys are "
                f"{', '.join(known)}."
            )
    if command:
        spec["command"] = Change(list(command), "after --")
    return Changes(spec, top.get("name"), env, stop_deadline=top.get("stopDeadline"))


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2001-13-45
        return text
    # Not 8 for 010, nor 90 for 1:30.
    changed = isinstance(value, int) and not isinstance(value, bool) and str(value) != text
    return text if changed else value


def apply(
    run: Mapping[str, Any], changes: Changes, wanted: set[str], overlay: str
) -> dict[str, Any]:
    """The content of run.yaml with the changes, checked; ``wanted`` are the values that the
    components read. Raises UsageError."""
    spec = {**run["spec"], **{key: change.value for key, change in changes.spec.items()}}
    for key, change in changes.spec.items():
        if change.value is None:
            raise UsageError(f"{key} has no value ({change.origin}); add one, or remove it.")
        if key not in wanted:
            raise UsageError(
                f"{key} is {change.value!r} ({change.origin}), but no component of the overlay "
                f"{overlay} reads it; add a component that does, or remove it."
            )
    for key in sorted(wanted - spec.keys()):
        option = next((name for name, of in TORCHX_OPTIONS.items() if of == key), None)
        torchx = f" (with TorchX: -cfg {option}=VALUE)" if option else ""
        raise UsageError(
            f"{key} is required by a component; add --set {key}=VALUE{torchx}, or `{key}: VALUE` "
            f"to spec in the run.yaml of the overlay {overlay}, where VALUE is "
            f"{_WHAT.get(key, _WHAT_PODS)}."
        )
    try:
        checked = Spec.model_validate(spec)
    except ValidationError as error:
        raise _explained(error, spec, changes, overlay) from None
    if checked.minNodes is not None and checked.minNodes > checked.nodes:
        raise UsageError(
            f"minNodes is {checked.minNodes}, more than nodes, {checked.nodes}; decrease it."
        )
    metadata = dict(run["metadata"])
    if changes.name:
        metadata["name"] = changes.name.value
    values = checked.model_dump(exclude_none=True)
    return {**run, "metadata": metadata, "spec": {k: values[k] for k in values if k in wanted}}


def _explained(
    error: ValidationError, spec: Mapping[str, Any], changes: Changes, overlay: str
) -> UsageError:
    key = str(error.errors()[0]["loc"][0])
    origin = changes.origin(key, overlay)
    if key not in Spec.model_fields:
        return UsageError(
            f"{key} is not a key of spec ({origin}){did_you_mean(key, Spec.model_fields)}"
        )
    what = _WHAT.get(key, _WHAT_PODS)
    return UsageError(f"{key} must be {what}, but is {spec.get(key)!r} ({origin}).")


_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def number(quantity: str | int) -> float:
    """A Kubernetes quantity in bytes or cores. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|([kKMGTP]?)(i?))", str(quantity))
    if not match:
        raise UsageError(
            f"The quantity {str(quantity)!r} is not a number with a unit such as 500m, 16Gi or 1G; "
            "correct it in the overlay."
        )
    if match[2] == "m":
        return float(match[1]) / 1000
    base = 1024.0 if match[4] else 1000.0
    return float(match[1]) * base ** _POWERS[match[3].replace("K", "k")]
