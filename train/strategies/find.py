"""The strategy that a config asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config.schema import Config
    from train.strategies.base import Strategy
    from train.world import World


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
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"zero{stage}" if stage in ("1", "2", "3") else None
    return "fsdp2" if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


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
