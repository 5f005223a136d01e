"""The process that runs checks, and the training that it checks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from launch.contract import World, whole_number

if TYPE_CHECKING:
    from launch.contract import LoadedConfig

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class Place:
    """What the checks of one process depend on."""

    world: World
    level: Level
    loaded: LoadedConfig | None = None
    """The config of the training, if it is known."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def full(self) -> bool:
        """Whether checks that take long run, too."""
        return self.level == "full"

    @property
    def leads(self) -> bool:
        """Whether this process runs the checks of its node."""
        return self.world.local_rank == 0

    @property
    def node(self) -> int:
        """The launcher's number of the node, from 0."""
        for name in ("GROUP_RANK", "SLURM_NODEID"):
            number = whole_number(self.environ.get(name, ""))
            if number is not None:
                return number
        return self.world.rank // self.world.local_world_size
