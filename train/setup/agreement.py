"""Checks, before anything is computed or written, that all ranks are in the same run."""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from train.config.compose import flatten
from train.config.schema import Config
from train.distributed.collectives import Collectives
from train.exits import UsageError

FILE_VISIBLE_SECONDS = 10.0
"""Network file systems show a new file to other hosts only after some seconds."""


def check_same_run(collectives: Collectives, config: Config, code: dict[str, Any]) -> list[str]:
    """The host names of all ranks, ordered by rank; collective.

    Raises UsageError, on all ranks, where the config, the code or WORLD_SIZE of a rank differs.
    """
    facts = {
        "WORLD_SIZE": collectives.world_size,
        "version of torch": torch.__version__,
        "version of isorun": code["isorun"],
        # None where git is missing or too slow on that node.
        "git commit": code.get("commit"),
        "git's answer to whether files are changed": code.get("dirty"),
        **{key: repr(value) for key, value in flatten(config.model_dump(mode="json")).items()},
    }
    everyone = collectives.all_gather_object((socket.gethostname(), facts))
    hosts = [host for host, _ in everyone]
    for name in dict.fromkeys(name for _, theirs in everyone for name in theirs):
        values = [theirs.get(name, "not set") for _, theirs in everyone]
        known = [value for value in values if value is not None]
        usual = _most_common(known) if known else None
        different = [rank for rank, value in enumerate(values) if value not in (None, usual)]
        if different:
            raise UsageError(
                f"The ranks are not in the same run: {name} is {values[different[0]]} on "
                f"{_named(different, hosts)}, but {usual} on the others; start all ranks with the "
                "same command, code and environment."
            )
    return hosts


def check_shared_directory(collectives: Collectives, directory: Path, as_set: Path) -> None:
    """Checks that all ranks see the run directory of rank 0; collective. ``as_set`` is its path as
    the config sets it, for the message.

    Raises UsageError, on all ranks, where one does not.
    """
    if collectives.world_size == 1:
        return
    token = directory / f".seen-{collectives.broadcast_object(secrets.token_hex(8))}"
    if collectives.rank == 0:
        token.touch()
    collectives.barrier()
    everyone = collectives.all_gather_object((socket.gethostname(), _appears(token)))
    if collectives.rank == 0:
        token.unlink()
    without = [rank for rank, (_, seen) in enumerate(everyone) if not seen]
    if without:
        hosts = [host for host, _ in everyone]
        raise UsageError(
            f"The run directory {as_set} of rank 0 (on {hosts[0]}) is not visible to "
            f"{_named(without, hosts)} under this name; set run.dir to a directory on a file "
            "system that all hosts share."
        )


def _appears(token: Path) -> bool:
    deadline = time.monotonic() + FILE_VISIBLE_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _most_common(values: list[Any]) -> Any:
    """The most common value; of equally common ones, the one of the lowest rank."""
    counts = Counter(values)
    most = max(counts.values())
    return next(value for value in values if counts[value] == most)


def _named(ranks: list[int], hosts: list[str]) -> str:
    listed = ", ".join(str(rank) for rank in ranks[:8]) + (" ..." if len(ranks) > 8 else "")
    on = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed} ({on})"
