"""A run directory to look at from Python: who the run is, what it measured, what it saved."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from train.checkpoint.damage import DamagedError
from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.exits import UsageError
from train.json_files import is_count, is_number, json_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Series(NamedTuple):
    """One metric over a run."""

    steps: NDArray[np.int64]
    """The steps at which it was logged, ascending; shape (N,)."""
    values: NDArray[np.float64]
    """Its values there, NaN where it was not finite; shape (N,)."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    path: Path
    metrics: Mapping[str, float]
    """The evaluation at its step; empty if there was none."""


class Run:
    """A read-only view of a run directory, also of one whose run is in progress.

    ``metrics`` and ``attempts`` are read when first used; make a new view to see later ones.
    Raises UsageError where there is no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._directory = RunDirectory(self.path)
        if not self._directory.exists:
            raise UsageError(f"There is no run in {path}; name the run.dir of one.")
        identity = self._directory.identity("")
        self.id, self.name, self.created = identity.id, identity.name, identity.created

    def __repr__(self) -> str:
        return f"<train.Run {self.id} in {self.path}>"

    @property
    def config(self) -> dict[str, Any]:
        """The config of the newest attempt as plain values; empty before the first."""
        return self._directory.stored_config() or {}

    @property
    def finished(self) -> dict[str, Any] | None:
        """finished.json: final step, metrics and more; None if the run is not complete."""
        return self._directory.finished()

    @cached_property
    def attempts(self) -> list[dict[str, Any]]:
        """Each start: time, hosts, strategy, the step it continued from and more; in ``ended`` the
        time, exit code and reason of its end. One that was killed or is in progress has none."""
        return list(_rows(self.path / "attempts.jsonl"))

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """Everything in metrics.jsonl by name, such as ``steps, losses = metrics["train/loss"]``.
        The field ``time`` is a series as well: seconds since the epoch. Values that are not
        numbers are left out."""
        import numpy as np

        found: dict[str, tuple[array[int], array[float]]] = {}  # of 8 bytes a number
        for row in _rows(self._directory.metrics):
            step = row.get("step")
            if not is_count(step):
                continue
            for name, value in row.items():
                if name not in ("step", "attempt") and (value is None or is_number(value)):
                    number = float("nan") if value is None else float(value)
                    steps, values = found.setdefault(name, (array("q"), array("d")))
                    steps.append(step)
                    values.append(number)
        return {
            name: Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
            for name, (steps, values) in found.items()
        }

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first. Their hashes are not checked; `verify` does."""
        store = CheckpointStore(self._directory.checkpoints)
        found = []
        for step in store.steps():
            try:
                metrics = Manifest.read(store.path(step)).metrics or {}
            except DamagedError:
                metrics = {}
            found.append(Checkpoint(step, store.path(step), metrics))
        return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, without a line that is being written or is damaged."""
    if not path.is_file():
        return
    yield from (row for _, row in json_lines(path) if row is not None)
