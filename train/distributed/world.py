"""The rank of this process and the size of its world, from the launcher's environment variables.

torchrun, ``accelerate launch``, the DeepSpeed launcher and Kubeflow set torch's variables (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR ...). Slurm's ``srun`` sets its own, which are translated here
to torch's.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from train.exits import UsageError
from train.numeric_text import port_number, whole_number, whole_number_in

# What torch and Accelerate read as well; they fail on a blank value.
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The rank of this process and the size of its world."""

    rank: int
    """From 0 to ``world_size`` - 1; rank 0 logs and writes."""
    world_size: int
    """Processes of the run."""
    local_rank: int
    """Rank among the processes of this host."""
    local_world_size: int
    """Processes of the run on this host."""
    launcher: str
    """What started the process: python, torchrun, accelerate, deepspeed, srun, or unknown."""
    host: str
    """Host name."""
    local_rank_guessed: bool = False
    """Whether no variable gives the local rank; it is then 0."""

    @property
    def on_one_host(self) -> bool:
        """Whether all processes are on this host."""
        return self.local_world_size == self.world_size


def find_world(environ: MutableMapping[str, str]) -> World:
    """Reads torch's variables from ``environ``; adds them to it if only Slurm's are set, and
    removes blank ones, which count as not set.

    Raises UsageError if a variable is missing or contradicts another.
    """
    for name in _VARIABLES:
        if name in environ and not environ[name].strip():
            del environ[name]
    if "RANK" not in environ and "WORLD_SIZE" not in environ and _started_by_srun(environ):
        environ.update(_from_slurm(environ))
        launcher = "srun"
    else:
        launcher = _launcher(environ)
    if ("RANK" in environ) != ("WORLD_SIZE" in environ):
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in environ else ("WORLD_SIZE", "RANK")
        raise UsageError(
            f"{there} is set in the environment ({environ[there]!r}), but {missing} is not; start "
            f"the run with torchrun or accelerate launch, which set both, or unset {there}."
        )
    world_size = whole_number_in(environ, "WORLD_SIZE", 1, at_least=1)
    rank = whole_number_in(environ, "RANK", 0)
    if rank >= world_size:
        raise UsageError(
            f"RANK must be less than WORLD_SIZE, {world_size}, but is {rank} (environment); ranks "
            "are counted from 0."
        )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise UsageError(
                    f"WORLD_SIZE is {world_size} in the environment, but {name} is not set, so the "
                    "ranks cannot rendezvous; start the run with torchrun or accelerate launch, "
                    f"or set {name} to that of rank 0."
                )
        if port_number(environ["MASTER_PORT"].strip()) is None:
            raise UsageError(
                f"MASTER_PORT must be a port, 1 to 65535, but is {environ['MASTER_PORT']!r} "
                "(environment); correct it, or start the run with torchrun."
            )
    local_rank, local_world_size = _on_this_host(environ, rank, world_size)
    return World(
        rank,
        world_size,
        local_rank or 0,
        local_world_size,
        launcher,
        socket.gethostname(),
        local_rank_guessed=local_rank is None and world_size > 1,
    )


# Variables of srun and of MPI's launchers: rank, world size, local rank and ranks of the host.
_STARTERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    (
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)  # fmt: skip


def _on_this_host(environ: Mapping[str, str], rank: int, world_size: int) -> tuple[int | None, int]:
    """The local rank, None if no variable gives it, and the number of ranks of this host.

    Where LOCAL_RANK is not set, that of the program that started this rank counts. A script may
    have started several ranks inside of one task, so its rank and world size must be those of the
    run.
    """
    local_rank, default = None, whole_number_in(environ, "LOCAL_SIZE", 1, at_least=1)  # DeepSpeed
    if environ.get("LOCAL_RANK", "").strip():
        local_rank = whole_number_in(environ, "LOCAL_RANK", 0)
    elif starter := _starter(environ, [str(rank), str(world_size)]):
        local_rank = whole_number_in(environ, starter[2], 0)
        if starter[3]:
            default = whole_number_in(environ, starter[3], default, at_least=1)
        else:
            default = _slurm_tasks_of_node(environ)
    local_world_size = whole_number_in(environ, "LOCAL_WORLD_SIZE", default, at_least=1)
    if local_rank is None and environ.get("LOCAL_WORLD_SIZE", "").strip():
        local_rank = rank % local_world_size
    return local_rank, local_world_size


def _starter(environ: Mapping[str, str], ours: list[str]) -> tuple[str, str, str, str] | None:
    """The names of the variables of the program that started this rank, whose rank and world size
    are ``ours``."""
    for names in _STARTERS:
        values = [environ.get(name, "").strip() for name in names[:3]]
        if values[:2] == ours and values[2]:
            return names
    return None


@cache
def this_world() -> World:
    """The World of this process, read from ``os.environ`` at the first call and cached."""
    return find_world(os.environ)


def world_warnings(world: World, gpus: int, parent: list[str] | None = None) -> list[str]:
    """Sentences on differences between the world and what the user requested.

    ``gpus``: CUDA devices of this host. ``parent``: the parent process's command line; by default
    it is read from /proc (Linux).
    """
    parent = _parent_command() if parent is None else parent
    found = []
    requested = _accelerate_processes(parent)
    if requested is not None and requested > world.world_size:
        found.append(
            f"accelerate launch was asked for {requested} processes but started "
            f"{world.world_size}: with --cpu it starts only one; remove --cpu and pass a file of "
            "configs/accelerate, or use torchrun."
        )
    for name in ("PET_NPROC_PER_NODE", "PET_NNODES"):
        value = os.environ.get(name, "")
        if value not in ("", "1", "1:1") and world.launcher in ("python", "unknown"):
            found.append(
                f"{name} is {value} (environment), but only torchrun and the node agent read it, "
                "so this process runs alone; start the run with `torchrun -m train` or "
                "`python -m launch.agent`."
            )
    if gpus > world.local_world_size:
        found.append(
            f"{world.host} has {gpus} GPUs, but the run has {world.local_world_size} process(es) "
            "there, which use one GPU each; start it with torchrun --nproc-per-node gpu to use all."
        )
    return found


def _launcher(environ: Mapping[str, str]) -> str:
    if launcher := environ.get("ISORUN_LAUNCHER"):  # train.launch, the node agent
        return launcher
    if any(name.startswith("ACCELERATE_") for name in environ):
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "CROSS_RANK" in environ:
        return "deepspeed"
    return "unknown" if "RANK" in environ else "python"


def _started_by_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has most of Slurm's variables too."""
    tasks = whole_number_in(environ, "SLURM_STEP_NUM_TASKS", 1)
    return "SLURM_PROCID" in environ and tasks > 1


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables from srun's; the port is a function of job id and step id."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (whole_number_in(environ, n, 0) for n in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID") or "0",
        "LOCAL_WORLD_SIZE": str(_slurm_tasks_of_node(environ)),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + (job * 7 + step) % 30000),
    }


def _slurm_tasks_of_node(environ: Mapping[str, str]) -> int:
    per_node = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE") or "1")
    node = whole_number_in(environ, "SLURM_NODEID", 0)
    return per_node[node] if node < len(per_node) else 1


def first_host(hosts: str) -> str:
    """The first host of a Slurm node list: ``gpu03`` for ``gpu[03-05,9],login``."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,\[]*)", hosts)
    assert match is not None
    prefix, numbers, suffix = match.groups()
    first = re.split(r"[-,]", numbers)[0] if numbers else ""
    return f"{prefix}{first}{suffix}"


def expand_counts(counts: str) -> list[int]:
    """Slurm's tasks per node as a list: [4, 4, 3] for ``4(x2),3``."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found


def _accelerate_processes(parent: list[str]) -> int | None:
    """num_processes of the parent ``accelerate launch``, from its command line or config file."""
    if "launch" not in parent:
        return None
    text = _option(parent, "num_processes")
    if text is None and (file := _option(parent, "config_file")):
        with suppress(OSError):
            words = re.search(r"^num_processes:\s*(\d+)", Path(file).read_text(), re.MULTILINE)
            text = words[1] if words else None
    return whole_number(text) if text else None


def _option(words: list[str], name: str) -> str | None:
    """The value of a command line's option, spelled with ``-`` or ``_``."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            return value if equals else next(iter(words[index + 1 : index + 2]), None)
    return None


def _parent_command() -> list[str]:
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.split("\0")
