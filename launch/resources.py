"""Named resources: what one node of a launch asks for, such as ``-h gpu_h100_8``.

The built-in names are generic: so much of a host with such GPUs as is there with every large
provider, less a share for the system. A user's own go into a YAML file (docs/resources.md):

    our_node:
      cpu: 64
      memMB: 512000
      gpu: 8

Each built-in name is also an attribute of this module, a function that TorchX's entry points
(group ``torchx.named_resources``) refer to.
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


class Shape(BaseModel):
    """What one node asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: int = Field(ge=1)
    """Cores, as the scheduler counts them."""
    memMB: int = Field(ge=1)  # noqa: N815 - TorchX's name
    """Main memory, in MiB."""
    gpu: int = Field(0, ge=0)
    capabilities: dict[str, Any] = {}
    """Read by schedulers, such as {node.kubernetes.io/instance-type: NAME}."""
    devices: dict[str, int] = {}
    """Further devices by name, such as {vpc.amazonaws.com/efa: 4}."""

    def resource(self) -> Resource:
        """The same in TorchX's terms."""
        from torchx.specs import Resource

        return Resource(
            cpu=self.cpu,
            gpu=self.gpu,
            memMB=self.memMB,
            capabilities=dict(self.capabilities),
            devices=dict(self.devices),
        )


# Kind of GPU: cores and GiB of main memory that go with each.
_PER_GPU = {"a100": (10, 80), "h100": (12, 180), "h200": (12, 180), "l4": (3, 12), "t4": (3, 12)}

BUILT_IN: dict[str, Shape] = {
    "cpu_small": Shape(cpu=2, memMB=8 * 1024),
    "cpu_large": Shape(cpu=16, memMB=64 * 1024),
} | {
    f"gpu_{kind}_{count}": Shape(
        cpu=cores * count,
        memMB=gib * 1024 * count,
        gpu=count,
        capabilities={"accelerator": kind},
    )
    for kind, (cores, gib) in _PER_GPU.items()
    for count in (1, 2, 4, 8)
}


def __getattr__(name: str) -> Callable[[], Resource]:
    """``launch.resources:gpu_h100_8`` for entry points."""
    if name in BUILT_IN:
        return partial(Shape.resource, BUILT_IN[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def own_file() -> Path:
    """Where a user's own resources are looked for."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "isorun" / "resources.yaml"


def own() -> dict[str, Shape]:
    """The user's own resources; none without a file. Raises UsageError for what is wrong in it,
    and for a file that ISORUN_RESOURCES names and that is not there."""
    path = own_file()
    where = f"{path} ({VARIABLE})" if os.environ.get(VARIABLE) else str(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if os.environ.get(VARIABLE):
            raise UsageError(
                f"{VARIABLE} names {str(path)!r}, which does not exist; correct or unset it."
            ) from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The named resources in {where} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"The named resources in {where} are not valid YAML{line}: "
            f"{getattr(error, 'problem', None) or error}."
        ) from None
    try:
        return TypeAdapter(dict[str, Shape]).validate_python(values or {})
    except ValidationError as error:
        raise _explained(error, values, where) from None


def _explained(error: ValidationError, values: Any, where: str) -> UsageError:
    first = error.errors()[0]
    if not isinstance(values, dict):
        return UsageError(f"{where} must hold names with their `cpu`, `memMB` and `gpu`.")
    name, *rest = (str(part) for part in first["loc"])
    field = ".".join(part for part in (name, *rest))
    fields = ", ".join(Shape.model_fields)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(rest[-1], Shape.model_fields)
        return UsageError(
            f"{field} is not a known key (value {first['input']!r}, from {where})"
            + (hint if hint != "." else f"; the keys are {fields}.")
        )
    if first["type"] == "missing":
        return UsageError(f"{field} is missing in {where}; a resource needs cpu and memMB.")
    what = f"{field} is {first['input']!r} in {where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return UsageError(f"{what}; the keys of a resource are {fields}.")


def find(name: str) -> Resource:
    """A resource by its name: the user's own, else any that TorchX knows, isorun's included.
    Raises UsageError."""
    from torchx.specs import resource

    mine = own()
    for known in (mine, BUILT_IN):
        if name in known:
            return known[name].resource()
    try:
        return resource(h=name)
    except KeyError:
        raise UsageError(
            f"-h is {name!r}, which is no named resource"
            f"{did_you_mean(name, [*mine, *BUILT_IN])[:-1]}; there are {', '.join(BUILT_IN)}, "
            f"TorchX's own, and those in {own_file()}."
        ) from None
