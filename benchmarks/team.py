"""The processes of a contender, one per rank, which persist over all turns."""

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
    """A contender on one or more ranks. Between turns its processes block on a pipe."""

    def __init__(self, name: str, train: Train, sizes: list[Any], ranks: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._pipes: list[Connection] = []
        self._processes = []
        port = free_port()
        for rank in range(ranks):
            pipe, theirs = context.Pipe()
            place = _torchrun_variables(rank, ranks, port) if ranks > 1 else {}
            words = (place, train, sizes, theirs, Path(self._directory.name))
            process = context.Process(target=_rank, args=words)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def turn(self) -> float:
        """Runs one turn on all ranks; returns rank 0's seconds per step."""
        return float(self._ask(True)[0])

    def last(self) -> Trained:
        """Ends the training; returns the mean losses of all ranks and rank 0's memory."""
        results: list[Trained] = self._ask(False)
        means = [
            sum(ranks) / len(ranks) for ranks in zip(*(r.losses for r in results), strict=True)
        ]
        return results[0]._replace(losses=means)

    def _ask(self, proceed: bool) -> list[Any]:
        """Sends a message to all ranks; returns their answers. Exits if one of them failed."""
        for pipe in self._pipes:
            pipe.send(proceed)
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self._pipes):
            ready = wait([pipe for pipe in self._pipes if pipe not in answers])
            for pipe in (p for p in self._pipes if p in ready):
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = "a process ended without a result"
                if isinstance(answers[pipe], str):
                    raise SystemExit(f"{self.name} failed:\n{answers[pipe]}")
        return [answers[pipe] for pipe in self._pipes]

    def end(self) -> None:
        """Ends all processes; kills those that do not end within 5 s."""
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


def _torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for a rank."""
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
