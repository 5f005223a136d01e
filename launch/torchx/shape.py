"""The shape of a launch (``-j``): its nodes and processes, and the resources of each node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.agent.arguments import as_nnodes
from launch.contract import UsageError
from launch.torchx.resources import find_resource

if TYPE_CHECKING:
    from torchx.specs import Resource

_J = re.compile(r"(?:(?:([0-9]{1,9}):)?([0-9]{1,9})x)?(0{0,9}[1-9][0-9]{0,8}|auto)")

# Cores and MiB of memory by default. A process imports torch and loads data; one with a GPU runs
# several data loader workers.
_PER_PROCESS = (2, 8 * 1024)
_PER_GPU = (4, 16 * 1024)


@dataclass(frozen=True)
class Shape:
    """The nodes of a launch, and the processes on each."""

    min_nodes: int
    max_nodes: int
    processes: int | None
    """Per node; None: one per GPU, or one without GPUs."""

    @property
    def nnodes(self) -> str:
        """The value of the agent's ``--nnodes``."""
        return as_nnodes(self.min_nodes, self.max_nodes)

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may join and leave."""
        return self.min_nodes < self.max_nodes

    @property
    def world_size(self) -> int | None:
        """Processes on all nodes; None if unknown before the launch."""
        return self.processes and self.processes * self.max_nodes


def parse(j: str) -> Shape:
    """``2x4``: two nodes with four processes each; ``4``: one node with four processes; ``1:4x8``:
    one to four nodes with eight; ``2xauto``: one process per GPU. Raises UsageError."""
    match = _J.fullmatch(j.strip())
    low, nodes, processes = match.groups() if match else (None, None, None)
    nodes = nodes or "1"
    low = low or nodes
    if not match or not 1 <= int(low) <= int(nodes):
        raise UsageError(
            f"-j is {j!r}, but must be NODESxPROCESSES such as 2x4, MIN:MAXxPROCESSES such as "
            "1:4x8, or PROCESSES, all at least 1; PROCESSES may be auto: one per GPU."
        )
    return Shape(int(low), int(nodes), None if processes == "auto" else int(processes or 1))


def resource(shape: Shape, h: str | None, cpu: int, gpu: int, mem: int) -> Resource:
    """The resources of each node: a named resource, or the given numbers, where 0 means a default
    that depends on the number of processes. ``mem`` is in MiB. Raises UsageError."""
    from torchx.specs import Resource

    if h:
        given = {"--cpu": cpu, "--gpu": gpu, "--memMB": mem}
        if both := [f"{flag} {value}" for flag, value in given.items() if value]:
            raise UsageError(
                f"-h {h} sets cpu, gpu and memMB, but {both[0]} is given too; remove one of them."
            )
        found = find_resource(h)
    else:
        for flag, value in (("--cpu", cpu), ("--gpu", gpu), ("--memMB", mem)):
            if value < 0:
                raise UsageError(f"{flag} must not be negative, but is {value}.")
        count, (cores, size) = (gpu, _PER_GPU) if gpu else (shape.processes or 1, _PER_PROCESS)
        found = Resource(cpu=cpu or cores * count, gpu=gpu, memMB=mem or size * count)
    if found.gpu > 0 and (shape.processes or 0) > found.gpu:
        raise UsageError(
            f"-j requests {shape.processes} processes per node, but "
            f"{'-h ' + h if h else '--gpu'} gives each node {found.gpu} GPUs, and each process "
            "uses one GPU; request at most as many processes as GPUs."
        )
    return found
