"""Fetches one micro-batch from the user's dataset, with every sample's randomness seeded.

The seed of a sample is that of its place in the stream, so what augmentation draws depends on
neither workers, ranks nor restarts. Errors come back as data that names the sample.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.order import sample_seed

EVALUATION = -1  # stands for the epoch in the keys of evaluation samples
_NAMED = 8  # indices that an error names at the most


class SampleKeys(NamedTuple):
    """What is to be loaded as one micro-batch; int64 arrays of the same length."""

    positions: NDArray[np.int64]
    epochs: NDArray[np.int64]
    indices: NDArray[np.int64]
    digest: int
    """Of positions and indices, for the ledger."""
    counts: bool = True
    """False for a micro-batch that only keeps ranks in step."""


class MicroBatch(NamedTuple):
    """A micro-batch on the host, the positions and indices of its samples, and their digest."""

    batch: Any
    positions: NDArray[np.int64]
    indices: NDArray[np.int64]
    digest: int
    counts: bool


class LoadFailure(NamedTuple):
    """An error, returned as data: torch would wrap a worker's exception in prose."""

    text: str
    details: str
    error: BaseException | None


class KeyedDataset:
    """The user's dataset, asked by :class:`SampleKeys`, with every sample's randomness seeded."""

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate
        self.deterministic = bool(getattr(dataset, "deterministic", False))
        self.checked = False

    def __getitems__(self, keys: SampleKeys) -> MicroBatch | LoadFailure:
        from torch.utils.data import get_worker_info

        if self.checked and (self.deterministic or get_worker_info()):
            return self._load(keys)
        with _UndisturbedRandomness() as generators:
            loaded = self._load(keys)
            if self.deterministic and generators.disturbed():
                # Something, often collate, draws random numbers after all, so they need seeds.
                self.deterministic = False
                loaded = self._load(keys)
        self.checked = True
        return loaded

    def _load(self, keys: SampleKeys) -> MicroBatch | LoadFailure:
        from torch.utils.data import get_worker_info

        at = 0
        try:
            if self.deterministic and hasattr(self.dataset, "__getitems__"):
                at = -1
                samples = self.dataset.__getitems__(keys.indices.tolist())
            else:
                samples = []
                for at in range(len(keys.indices)):
                    samples.append(self._sample(int(keys.epochs[at]), int(keys.indices[at])))
            at = -2
            batch = self.collate(samples)
        except Exception as error:
            # An exception of the user's may not survive pickling, so workers send its text.
            cause = None if get_worker_info() else error
            return LoadFailure(self._describe(keys, at, error), traceback.format_exc(), cause)
        return MicroBatch(batch, keys.positions, keys.indices, keys.digest, keys.counts)

    def _sample(self, epoch: int, index: int) -> Any:
        if not self.deterministic:
            import torch

            seed = sample_seed(self.seed, epoch, index)
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
        return self.dataset[index]

    def _describe(self, keys: SampleKeys, at: int, error: BaseException) -> str:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        name = type(self.dataset).__name__
        if at >= 0:
            return (
                f"The dataset {name} failed at index {keys.indices[at]} "
                f"{_place(keys, slice(at, at + 1))} with {what}; repair or leave out that sample."
            )
        doing = "loading together" if at == -1 else "joining (collate)"
        first = ", ".join(map(str, keys.indices[:_NAMED])) + ", ..." * (len(keys.indices) > _NAMED)
        return (
            f"The dataset {name} failed at {doing} the samples of indices {first} "
            f"{_place(keys, slice(None))} with {what}; repair these samples or the code for them."
        )


def _place(keys: SampleKeys, which: slice) -> str:
    """Where in the stream samples stand, in words."""
    epochs, positions = keys.epochs[which], keys.positions[which]
    if epochs[0] == EVALUATION:
        return "in the evaluation"
    if len(epochs) == 1:
        return f"in epoch {epochs[0]} (position {positions[0]} of the stream)"
    return f"in epoch {epochs[0]} (positions {positions[0]} to {positions[-1]} of the stream)"


class _UndisturbedRandomness:
    """Puts the global generators back as they were: loading must not change model randomness."""

    def __enter__(self) -> _UndisturbedRandomness:
        self._torch, self._random, self._numpy = self._states()
        return self

    def _states(self) -> tuple[Any, Any, Any]:
        import torch

        return torch.default_generator.get_state(), random.getstate(), np.random.get_state()

    def disturbed(self) -> bool:
        """Whether a generator has moved on since the start."""
        import torch

        now = self._states()
        return (
            not torch.equal(self._torch, now[0])
            or self._random != now[1]
            or any(not np.array_equal(a, b) for a, b in zip(self._numpy, now[2], strict=True))
        )

    def __exit__(self, *_: object) -> None:
        import torch

        torch.default_generator.set_state(self._torch)
        random.setstate(self._random)
        np.random.set_state(self._numpy)
