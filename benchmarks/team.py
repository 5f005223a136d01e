"""A contender's processes, one per rank, that live through all turns and wait in between."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.contenders import Train, Trained, serve


class Team:
    """A contender on one or more ranks, seen from here. Between two turns each of its processes
    is blocked on a pipe."""

    def __init__(self, name: str, train: Train, sizes: list[Any], ranks: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._pipes: list[Connection] = []
        self._processes = []
        port = free_port()
        for rank in range(ranks):
            pipe, theirs = context.Pipe()
            place = _place(rank, ranks, port) if ranks > 1 else {}
            words = (place, train, sizes, theirs, Path(self._directory.name))
            process = context.Process(target=_rank, args=words)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def turn(self) -> float:
        """Lets all ranks work one turn; rank 0's seconds per step."""
        return float(self._ask(True)[0])

    def last(self) -> Trained:
        """Ends the training; the ranks' mean losses and rank 0's memory."""
        said: list[Trained] = self._ask(False)
        means = [sum(ranks) / len(ranks) for ranks in zip(*(s.losses for s in said), strict=True)]
        return said[0]._replace(losses=means)

    def _ask(self, go_on: bool) -> list[Any]:
        """What each rank says; ends the program where one says that it failed."""
        for pipe in self._pipes:
            pipe.send(go_on)
        said: dict[Connection, Any] = {}
        while len(said) < len(self._pipes):
            ready = wait([pipe for pipe in self._pipes if pipe not in said])
            for pipe in (p for p in self._pipes if p in ready):
                try:
                    said[pipe] = pipe.recv()
                except EOFError:
                    said[pipe] = "a process has gone without a word"
                if isinstance(said[pipe], str):
                    raise SystemExit(f"{self.name} failed:\n{said[pipe]}")
        return [said[pipe] for pipe in self._pipes]

    def end(self) -> None:
        """Ends it, if it has not ended by itself."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            process.kill()
            process.join()
        self._directory.cleanup()


def _rank(place: dict[str, str], *arguments: Any) -> None:
    os.environ.update(place)
    serve(*arguments)


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
