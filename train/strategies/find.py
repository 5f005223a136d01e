"""The strategy that a config asks for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config.schema import Config
    from train.strategies.base import Strategy


def strategy_name(config: Config) -> str:
    """The name of the strategy; ``auto`` is one process, or DDP for several."""
    if config.strategy != "auto":
        return config.strategy
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


def accelerate_options(config: Config) -> list[Any]:
    """What Accelerate must know of the strategy."""
    if strategy_name(config) != "ddp":
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
