"""How many nodes and processes (``-j``), and what each node asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.contract import UsageError
from launch.resources import find

if TYPE_CHECKING:
    from torchx.specs import Resource

_J = re.compile(r"(?:(?:(\d+):)?(\d+)x)?(\d+|auto)")

# A process imports torch and loads data; a GPU wants that several times over.
_PER_PROCESS = (2, 8 * 1024)
_PER_GPU = (4, 16 * 1024)


@dataclass(frozen=True)
class Shape:
    """The nodes of a launch."""

    min_nodes: int
    max_nodes: int
    processes: int | None
    """Per node; None: as many as the node has GPUs, or one."""

    @property
    def nnodes(self) -> str:
        """As the agent takes it."""
        if self.min_nodes == self.max_nodes:
            return str(self.max_nodes)
        return f"{self.min_nodes}:{self.max_nodes}"

    @property
    def world_size(self) -> int | None:
        """Of all nodes, where it is known."""
        return self.processes and self.processes * self.max_nodes


def parse(j: str) -> Shape:
    """``2x4``: two nodes of four processes; ``4``: one node of four; ``1:4x8``: one to four nodes
    of eight; ``2xauto``: as many processes as a node has GPUs. Raises UsageError."""
    match = _J.fullmatch(j.strip())
    low, nodes, processes = match.groups() if match else (None, None, None)
    nodes = nodes or "1"
    low = low or nodes
    if not match or processes == "0" or not 1 <= int(low) <= int(nodes):
        raise UsageError(
            f"-j is {j!r}, but must be NODESxPROCESSES such as 2x4, MIN:MAXxPROCESSES such as "
            "1:4x8, or PROCESSES alone, all at least 1; auto for as many processes as a node has "
            "GPUs."
        )
    return Shape(int(low), int(nodes), None if processes == "auto" else int(processes or 1))


def resource(shape: Shape, h: str | None, cpu: int, gpu: int, mem: int) -> Resource:
    """What each node asks for: the named resource, or the numbers; 0 means a default that suits
    the processes. ``mem`` is in MiB. Raises UsageError."""
    from torchx.specs import Resource

    if h:
        given = {"--cpu": cpu, "--gpu": gpu, "--memMB": mem}
        if both := [f"{flag} {value}" for flag, value in given.items() if value]:
            raise UsageError(f"-h {h} says it all, but {both[0]} is given as well; drop one.")
        found = find(h)
    else:
        for flag, value in (("--cpu", cpu), ("--gpu", gpu), ("--memMB", mem)):
            if value < 0:
                raise UsageError(f"{flag} must not be negative, but is {value}.")
        count, (cores, size) = (gpu, _PER_GPU) if gpu else (shape.processes or 1, _PER_PROCESS)
        found = Resource(cpu=cpu or cores * count, gpu=gpu, memMB=mem or size * count)
    if found.gpu > 0 and (shape.processes or 0) > found.gpu:
        raise UsageError(
            f"-j asks for {shape.processes} processes per node, but {'-h ' + h if h else '--gpu'} "
            f"gives each node {found.gpu} GPUs, and each process uses one; ask for as many."
        )
    return found
