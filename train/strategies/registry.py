"""The strategy that a config asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.exits import UsageError, first_line

if TYPE_CHECKING:
    from train.config.schema import Config
    from train.distributed.world import World
    from train.strategies.base import Strategy


def strategy_name(config: Config, world: World) -> str:
    """The name of the strategy. ``auto`` is what ``accelerate launch`` asks for, or else DDP for
    several processes."""
    if config.strategy != "auto":
        return config.strategy
    asked = _asked_by_accelerate(os.environ)
    if asked:
        return asked
    return "ddp" if world.world_size > 1 else "single"


def _asked_by_accelerate(environ: Mapping[str, str]) -> str | None:
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = _stage_in_file(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        stage = stage or environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{stage}" if stage in ("1", "2", "3") else None
    return "fsdp2" if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


def _stage_in_file(path: str | None) -> str | None:
    """The stage that a DeepSpeed config of the user's own names. Raises UsageError."""
    if not path or path.lower() == "none":
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return str(values.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"accelerate launch names the DeepSpeed config {path!r}, which cannot be read "
            f"({first_line(error)}); correct it, or set the strategy (strategy=zero2)."
        ) from None


def accelerate_options(config: Config, world: World) -> list[Any]:
    """What Accelerate must know of the strategy."""
    if strategy_name(config, world) != "ddp":
        return []
    from train.strategies.ddp import DdpStrategy

    return [DdpStrategy.accelerate_options(config.ddp)]


def find_strategy(name: str) -> type[Strategy]:
    """The class behind a name; imports only what it needs."""
    if name in ("single", "ddp"):
        from train.strategies.ddp import DdpStrategy, SingleStrategy

        return SingleStrategy if name == "single" else DdpStrategy
    if name == "fsdp2":
        from train.strategies.fsdp2 import Fsdp2Strategy

        return Fsdp2Strategy
    from train.strategies.zero import PartitionedGradients, PartitionedParameters

    return PartitionedParameters if name == "zero3" else PartitionedGradients
