"""The strategies by name, and which of them a run uses.

A new strategy is one class and one line in ``STRATEGIES``; one from outside the package is named
in the config by its dotted path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train.exits import UsageError, first_line
from train.json_files import parse_object

if TYPE_CHECKING:
    from train.strategies.base import Strategy

STRATEGIES = {
    "single": "train.strategies.single:SingleStrategy",
    "ddp": "train.strategies.ddp:DdpStrategy",
    "fsdp2": "train.strategies.fsdp2:Fsdp2Strategy",
    "zero1": "train.strategies.zero_stages:Zero1Strategy",
    "zero2": "train.strategies.zero_stages:Zero2Strategy",
    "zero3": "train.strategies.zero_stages:Zero3Strategy",
}
CHOICES = ("auto", *(name for name in STRATEGIES if name != "single"))
"""What the config's ``strategy`` may be, besides a dotted path."""


def resolve_name(wanted: str, world_size: int) -> str:
    """The strategy's name. ``auto`` is what ``accelerate launch`` asks for, otherwise ddp for
    several processes and single for one."""
    if wanted != "auto":
        return wanted
    return _asked_by_accelerate(os.environ) or ("ddp" if world_size > 1 else "single")


def find_strategy(name: str, origin: str) -> type[Strategy]:
    """The class of a strategy's name or dotted path; imports only what it needs. ``origin`` says
    where ``strategy`` was set. Raises UsageError where there is no such class."""
    from train.imports import import_class
    from train.strategies.base import Strategy

    found: type[Strategy] = import_class(
        STRATEGIES.get(name, name), Strategy, f"strategy ({origin})"
    )
    return found


def _asked_by_accelerate(environ: Mapping[str, str]) -> str | None:
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = _stage_in_file(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        stage = stage or environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{stage}" if stage in ("1", "2", "3") else None
    return "fsdp2" if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


def _stage_in_file(path: str | None) -> str | None:
    """The stage in a DeepSpeed config file of the user. Raises UsageError."""
    if not path or path.lower() == "none":
        return None
    try:
        values = parse_object(Path(path).read_bytes())
        return str(values.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"accelerate launch names the DeepSpeed config {path!r}, which cannot be read "
            f"({first_line(error)}); correct it, or set the strategy (strategy=zero2)."
        ) from None
