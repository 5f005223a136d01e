"""Before anything is computed or written, all ranks make sure that they are in the same run."""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config.compose import flatten
from train.exits import UsageError

if TYPE_CHECKING:
    from train.config.schema import Config
    from train.strategies.engine import Engine

SECONDS_TO_SEE_A_FILE = 10.0
"""Network filesystems show a new file to other hosts after some seconds."""


def check_agreement(engine: Engine, config: Config, code: dict[str, Any]) -> list[str]:
    """The hosts of all ranks, in the order of ranks; collective.

    Raises UsageError, on all ranks alike, where some rank has another config, other code or
    another idea of the world.
    """
    import torch

    facts = {
        "WORLD_SIZE": engine.world_size,
        "version of torch": torch.__version__,
        "code": " ".join(str(value) for value in code.values()),
        **{key: repr(value) for key, value in flatten(config.model_dump(mode="json")).items()},
    }
    everyone = engine.gather((socket.gethostname(), facts))
    hosts = [host for host, _ in everyone]
    for name in dict.fromkeys(name for _, theirs in everyone for name in theirs):
        values = [theirs.get(name, "not set") for _, theirs in everyone]
        usual = _usual(values)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise UsageError(
                f"The ranks are not in the same run: {name} is {values[odd[0]]} on "
                f"{_ranks(odd, hosts)}, but {usual} on the others; start all ranks with the same "
                "command, code and environment."
            )
    return hosts


def check_shared(engine: Engine, directory: Path) -> None:
    """Makes sure that all ranks see the run directory of rank 0; collective.

    Raises UsageError, on all ranks alike, where some do not.
    """
    if engine.world_size == 1:
        return
    token = directory / f".seen-{engine.broadcast(secrets.token_hex(8))}"
    if engine.is_main:
        token.touch()
    engine.broadcast(None)  # it is there now
    everyone = engine.gather((socket.gethostname(), _seen(token)))
    if engine.is_main:
        token.unlink()
    odd = [rank for rank, (_, seen) in enumerate(everyone) if not seen]
    if odd:
        hosts = [host for host, _ in everyone]
        raise UsageError(
            f"The run directory {directory} of rank 0, on {hosts[0]}, is not what "
            f"{_ranks(odd, hosts)} sees under this name; set run.dir to a directory on a "
            "filesystem that all hosts share."
        )


def _seen(token: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _usual(values: list[Any]) -> Any:
    """What most have; of equally many, what rank 0 has."""
    counts = Counter(values)
    most = max(counts.values())
    return next(value for value in values if counts[value] == most)


def _ranks(ranks: list[int], hosts: list[str]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:8]) + (" ..." if len(ranks) > 8 else "")
    on = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {named} ({on})"
