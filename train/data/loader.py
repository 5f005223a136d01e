"""Loads micro-batches with torch's DataLoader, in this process or in workers.

The samplers choose samples by their position in the stream alone, so that samples and their order
do not depend on ranks, workers or restarts.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from train.data.fetch import KeyedDataset, LoadFailure, MicroBatch
from train.data.loader_config import LoaderConfig
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan
from train.data.sampler import EvaluationSampler, TrainingSampler
from train.data.workers import (
    failure_of_worker,
    next_item,
    prepare_worker,
    start_workers,
    stop_workers,
)
from train.exits import DataError, UsageError, first_line

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Batches(Iterator[MicroBatch]):
    """An iterator over micro-batches, and a context manager.

    Entering it restarts the iteration; leaving it ends the workers, unless they persist until
    ``close``.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._iterator: Any = None
        self._failed = False

    def __enter__(self) -> Batches:
        self._iterator = None
        return self

    def __exit__(self, *_: object) -> None:
        if not self._loader.persistent_workers:
            self.close()

    def close(self) -> None:
        """Ends the workers, with SIGKILL after 1 s."""
        iterator: Any = self._loader._iterator if self._iterator is None else self._iterator
        self._iterator = None
        if not hasattr(iterator, "_shutdown_workers"):
            return
        stop_workers(iterator, failed=self._failed)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises DataError if the dataset or collate failed, unless the machine failed (RetryError) or
        memory (OutOfMemoryError), and RetryError if a worker was killed, crashed or timed out.
        """
        try:
            if self._iterator is None:
                self._iterator = start_workers(self._loader)
            loaded = next_item(self._iterator)
        # A dead worker's broken sockets and messages raise any of these.
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            if self._loader.num_workers == 0:
                raise
            self._failed = True
            raise failure_of_worker(self._iterator, error, self._loader.timeout) from error
        if isinstance(loaded, LoadFailure):
            in_worker = loaded.error is None and loaded.details
            raise loaded.kind(loaded.text) from (
                RuntimeError(loaded.details) if in_worker else loaded.error
            )
        batch: MicroBatch = loaded
        return batch


def training_batches(
    dataset: Any,
    order: SampleOrder,
    plan: BatchPlan,
    rank: int,
    *,
    collate: Callable[[list[Any]], Any],
    config: LoaderConfig,
    device_type: str,
    start_position: int,
    steps: int,
) -> Batches:
    """This rank's micro-batches of ``steps`` steps from ``start_position`` of the stream.

    Yields ``plan.accumulation`` micro-batches per step. The start is O(1) for any position.
    """
    keys = TrainingSampler(order, plan, rank, start_position, steps)
    return Batches(_loader(dataset, keys, order.seed, collate, config, device_type, training=True))


def evaluation_batches(
    dataset: Any,
    plan: EvalPlan,
    rank: int,
    *,
    seed: int,
    collate: Callable[[list[Any]], Any],
    config: LoaderConfig,
    device_type: str,
) -> Batches:
    """This rank's micro-batches of one pass over the evaluation data, with the same seeds each
    time.

    Over all ranks each sample occurs exactly once. A micro-batch whose ``counts`` is false holds
    sample 0 and only equalises the forward passes of all ranks.
    """
    keys = EvaluationSampler(plan, rank)
    return Batches(_loader(dataset, keys, seed, collate, config, device_type, training=False))


def _loader(
    dataset: Any,
    keys: Any,
    seed: int,
    collate: Callable[[list[Any]], Any],
    config: LoaderConfig,
    device_type: str,
    *,
    training: bool,
) -> DataLoader[Any]:
    import torch
    from torch.utils.data import DataLoader

    pin = device_type == "cuda" if config.pin_memory == "auto" else config.pin_memory
    workers = config.workers
    loader: DataLoader[Any] = DataLoader(
        KeyedDataset(dataset, seed, collate),  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_already_collated,
        pin_memory=pin,
        timeout=config.timeout,
        worker_init_fn=prepare_worker if workers else None,
        multiprocessing_context=config.multiprocessing_context if workers else None,
        # Without a generator of its own, DataLoader draws from the global one, the model's.
        generator=torch.Generator(),
        prefetch_factor=config.prefetch_factor,
        persistent_workers=config.persistent_workers and not training,
    )
    return loader


def _already_collated(loaded: Any) -> Any:
    """The identity: ``KeyedDataset.__getitems__`` collates, to catch the errors of collate."""
    return loaded


def check_dataset(dataset: Any, name: str) -> None:
    """Raises UsageError if a dataset is not map-style or has no length, and DataError if it is
    empty."""
    from torch.utils.data import IterableDataset

    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not map_style:
        raise UsageError(
            f"The task's {name}() returned a {type(dataset).__name__}, which is not a map-style "
            "dataset; implement __len__ and __getitem__(index), because a run resumes by sample "
            "index, on any number of processes."
        )
    try:
        length = len(dataset)
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise UsageError(
            f"The task's {name}() returned a {type(dataset).__name__} whose __len__ fails "
            f"({type(error).__name__}: {first_line(error)}); return the number of samples, a whole "
            "number, from it."
        ) from error
    if length == 0:
        raise DataError(
            f"The task's {name}() returned an empty dataset; return at least one sample."
        )
