"""Fetches one micro-batch from the user's dataset, with a seed for each sample.

The seed depends on epoch and index only, so random augmentation does not depend on workers, ranks
or restarts. Errors are returned as values that name the sample.
"""

from __future__ import annotations

import random
from bdb import BdbQuit
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.order import sample_seed
from train.exits import (
    DataError,
    OutOfMemoryError,
    RetryError,
    RunError,
    UsageError,
    message_of,
    shortened,
    traceback_of,
)
from train.process.diagnose import as_run_error
from train.process.stop_signals import is_of_signal

EVALUATION = -1  # the epoch in the keys of evaluation samples
_NAMED = 8  # indices that an error names at most
_LONGEST = 2_000  # characters of the text of an error


class SampleKeys(NamedTuple):
    """The samples of one micro-batch; int64 arrays of equal length."""

    positions: NDArray[np.int64]
    """Positions in the training stream (in an evaluation: the indices)."""
    epochs: NDArray[np.int64]
    indices: NDArray[np.int64]
    """Indices into the dataset."""
    digest: int
    """The ledger's digest of positions and indices."""
    counts: bool = True
    """False for a padding micro-batch, which only equalises the forward passes of all ranks."""


class MicroBatch(NamedTuple):
    """A micro-batch on the host, and the keys of its samples (see SampleKeys)."""

    batch: Any
    """What the task's ``collate`` returned."""
    positions: NDArray[np.int64]
    indices: NDArray[np.int64]
    digest: int
    counts: bool


class LoadFailure(NamedTuple):
    """An error of dataset or collate. A value, because torch rewrites the messages of
    exceptions."""

    text: str
    """One sentence for the user."""
    details: str
    """The traceback; empty where the text says all."""
    kind: type[RunError]
    """Whose fault it is: DataError, RetryError, OutOfMemoryError or UsageError."""
    error: BaseException | None
    """The exception; None from a worker, since it may not survive pickling."""


class KeyedDataset:
    """The user's dataset, indexed by :class:`SampleKeys`, with a seed for each sample.

    A dataset whose ``deterministic`` is true is not seeded, unless the first micro-batch draws
    random numbers.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate
        self.deterministic = bool(getattr(dataset, "deterministic", False))
        self.checked = False

    def __getitems__(self, keys: SampleKeys) -> MicroBatch | LoadFailure:
        from torch.utils.data import get_worker_info

        if self.checked and (self.deterministic or get_worker_info()):
            return self._load(keys)
        from train.distributed.randomness import GlobalRngState

        generators = GlobalRngState()  # loading must not change the model's randomness
        try:
            loaded = self._load(keys)
            if self.deterministic and generators.changed():
                # Dataset or collate draws random numbers although deterministic is true: seed them.
                self.deterministic = False
                loaded = self._load(keys)
        finally:
            generators.restore()
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
        # Also sys.exit, and a panic of a library in Rust, which is no Exception.
        except BaseException as error:
            if is_of_signal(error) and get_worker_info() is None:  # a worker ignores signals
                raise
            # The user's exception may not survive pickling, so workers send its text.
            cause = None if get_worker_info() else error
            kind = kind_of(error)
            remedy = _REMEDIES[kind][at < 0]
            if isinstance(error, BdbQuit):
                remedy = "remove the breakpoint, or use it on a terminal with loader.workers=0"
            text = f"{self._describe(keys, at, error)}; {remedy}."
            return LoadFailure(text, traceback_of(error), kind, cause)
        if batch is None:
            text = (
                f"The task's collate() returned None for {_samples(keys)}; return the batch, as "
                "default_collate does."
            )
            return LoadFailure(text, "", UsageError, None)
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
        message = shortened(" ".join(message_of(error).split()), _LONGEST)
        what = f"{type(error).__name__}: {message}" if message else type(error).__name__
        if isinstance(error, BdbQuit):
            what = "BdbQuit (the debugger ended, by its command q or without a terminal)"
        name = type(self.dataset).__name__
        if at >= 0:
            return (
                f"The dataset {name} failed at index {keys.indices[at]} "
                f"{_place(keys, slice(at, at + 1))} with {what}"
            )
        doing = "__getitems__ of" if at == -1 else "collate of"
        return f"The dataset {name} failed in {doing} {_samples(keys)} with {what}"


_MACHINE = "the machine, its storage or its network failed, not the data: fix the cause, then rerun"
_MEMORY = "there is not enough memory: lower loader.workers, or the memory that samples need"
# For one sample, and for several.
_REMEDIES: dict[type[RunError], tuple[str, str]] = {
    DataError: ("fix or remove this sample", "fix these samples or their code"),
    RetryError: (_MACHINE, _MACHINE),
    OutOfMemoryError: (_MEMORY, _MEMORY),
}


def kind_of(error: BaseException) -> type[RunError]:
    """Whose fault an error is that is raised while data is loaded."""
    known = as_run_error(error)
    kinds = (OutOfMemoryError, RetryError)
    return next((kind for kind in kinds if isinstance(known, kind)), DataError)


def _samples(keys: SampleKeys) -> str:
    """The samples of a micro-batch, for an error message."""
    first = ", ".join(map(str, keys.indices[:_NAMED])) + ", ..." * (len(keys.indices) > _NAMED)
    return f"the samples of indices {first} {_place(keys, slice(None))}"


def _place(keys: SampleKeys, which: slice) -> str:
    """Epoch and positions of samples, for an error message."""
    epochs, positions = keys.epochs[which], keys.positions[which]
    if epochs[0] == EVALUATION:
        return "in the evaluation"
    if len(epochs) == 1:
        return f"in epoch {epochs[0]} (position {positions[0]} of the stream)"
    return f"in epoch {epochs[0]} (positions {positions[0]} to {positions[-1]} of the stream)"
