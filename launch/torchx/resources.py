"""Named resources: what one node of a launch requests, such as ``-h gpu_h100_8``.

The built-in names are generic: the share of a host with such GPUs that all large providers offer,
minus a part for the system. Users define their own in a YAML file (docs/resources.md):

    our_node:
      cpu: 64
      memMB: 512000
      gpu: 8

Each built-in name is also an attribute of this module, a function for TorchX's entry points
(group ``torchx.named_resources``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from launch.contract import UsageError, did_you_mean

if TYPE_CHECKING:
    from torchx.specs import Resource

VARIABLE = "ISORUN_RESOURCES"


class NamedResource(BaseModel):
    """The resources of one node, as an entry of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: int = Field(ge=1)
    """Cores, in the scheduler's unit."""
    memMB: int = Field(ge=1)  # noqa: N815 - TorchX's name
    """Memory in MiB."""
    gpu: int = Field(0, ge=0)
    capabilities: dict[str, Any] = {}
    """Passed to the scheduler, such as {node.kubernetes.io/instance-type: NAME}."""
    devices: dict[str, int] = {}
    """Other devices by name, such as {vpc.amazonaws.com/efa: 4}."""

    def resource(self) -> Resource:
        """As a TorchX Resource."""
        from torchx.specs import Resource

        return Resource(
            cpu=self.cpu,
            gpu=self.gpu,
            memMB=self.memMB,
            capabilities=dict(self.capabilities),
            devices=dict(self.devices),
        )


# Type of GPU: cores and GiB of memory per GPU.
_PER_GPU = {"a100": (10, 80), "h100": (12, 180), "h200": (12, 180), "l4": (3, 12), "t4": (3, 12)}

BUILT_IN: dict[str, NamedResource] = {
    "cpu_small": NamedResource(cpu=2, memMB=8 * 1024),
    "cpu_large": NamedResource(cpu=16, memMB=64 * 1024),
} | {
    f"gpu_{kind}_{count}": NamedResource(
        cpu=cores * count,
        memMB=gib * 1024 * count,
        gpu=count,
        capabilities={"accelerator": kind},
    )
    for kind, (cores, gib) in _PER_GPU.items()
    for count in (1, 2, 4, 8)
}


def __getattr__(name: str) -> Callable[[], Resource]:
    """``launch.torchx.resources:gpu_h100_8`` for entry points."""
    if name in BUILT_IN:
        return partial(NamedResource.resource, BUILT_IN[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def user_file() -> Path:
    """The path of the user's file."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "isorun" / "resources.yaml"


def user_resources() -> dict[str, NamedResource]:
    """The resources in the user's file; empty if there is no file. Raises UsageError if the file
    is invalid, or if ISORUN_RESOURCES names a file that does not exist."""
    path = user_file()
    where = f"{path} ({VARIABLE})" if os.environ.get(VARIABLE) else str(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if os.environ.get(VARIABLE):
            raise UsageError(
                f"{VARIABLE} is {str(path)!r}, but this file does not exist; correct or unset the "
                "variable."
            ) from None
        return {}
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2001-13-45
        raise UsageError(
            f"The named resources in {where} cannot be read: {error}; correct the file."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"The named resources in {where} are not valid YAML{line}: "
            f"{getattr(error, 'problem', None) or error}; correct the file."
        ) from None
    try:
        return TypeAdapter(dict[str, NamedResource]).validate_python(values or {})
    except ValidationError as error:
        raise _explained(error, values, where) from None


def _explained(error: ValidationError, values: Any, where: str) -> UsageError:
    first = error.errors()[0]
    if not isinstance(values, dict):
        return UsageError(
            f"{where} must be a mapping from names to resources with `cpu`, `memMB` and `gpu`."
        )
    name, *rest = (str(part) for part in first["loc"])
    field = ".".join(part for part in (name, *rest))
    fields = ", ".join(NamedResource.model_fields)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(rest[-1], NamedResource.model_fields)
        return UsageError(
            f"{field} is not a known key (value {first['input']!r}, from {where})"
            + (hint if hint != "." else f"; the keys are {fields}.")
        )
    if first["type"] == "missing":
        return UsageError(f"{field} is missing in {where}; a resource needs cpu and memMB.")
    what = f"{field} is {first['input']!r} in {where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return UsageError(f"{what}; the keys of a resource are {fields}.")


def find_resource(name: str) -> Resource:
    """A resource by name: from the user's file, else isorun's, else any other that TorchX knows.
    Raises UsageError."""
    from torchx.specs import resource

    users = user_resources()
    for known in (users, BUILT_IN):
        if name in known:
            return known[name].resource()
    try:
        return resource(h=name)
    except KeyError:
        raise UsageError(
            f"-h is {name!r}, which is not a named resource"
            f"{did_you_mean(name, [*users, *BUILT_IN])[:-1]}; the names are {', '.join(BUILT_IN)}, "
            f"those of TorchX, and those in {user_file()}."
        ) from None
