"""Loads the samples that the order names, in this process or in workers, the same either way.

torch's DataLoader moves the data; which samples and in which order is decided here, by position
alone, so that nothing depends on ranks, workers or restarts.
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
from train.data.workers import next_item, prepare_worker, start_workers, stop_workers
from train.exits import DataError, RetryError, UsageError, first_line

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Batches(Iterator[MicroBatch]):
    """Micro-batches one after another. A context manager: to enter it starts from the beginning,
    to leave it ends the workers, unless they are to persist until ``close``."""

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
        """Ends the workers, by force if they do not end by themselves."""
        iterator: Any = self._loader._iterator if self._iterator is None else self._iterator
        self._iterator = None
        if not hasattr(iterator, "_shutdown_workers"):
            return
        stop_workers(iterator, failed=self._failed)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises DataError where the dataset or collate failed, and RetryError where a worker died
        or did not answer in time.
        """
        try:
            if self._iterator is None:
                self._iterator = start_workers(self._loader)
            loaded = next_item(self._iterator)
        # What a worker that is gone leaves of its sockets and messages looks like any of these.
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            if self._loader.num_workers == 0:
                raise
            self._failed = True
            raise RetryError(
                f"A data worker failed ({first_line(error)}); if it was killed, there may be too "
                "little memory or room in /dev/shm: use fewer loader.workers, or, if it was "
                f"slow, a longer loader.timeout (now {self._loader.timeout:g} s)."
            ) from error
        if isinstance(loaded, LoadFailure):
            in_worker = loaded.error is None
            raise DataError(loaded.text) from (
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
    """This rank's micro-batches of ``steps`` steps from ``start_position`` of the stream on:
    ``plan.accumulation`` of them for each step. To start anywhere costs nothing."""
    keys = TrainingSampler(order, plan, rank, start_position, steps)
    return Batches(_loader(dataset, keys, order.seed, collate, config, device_type, lasting=True))


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
    """This rank's micro-batches of one pass over the evaluation data: each sample exactly once
    over all ranks, in order. Where ``counts`` is false the batch (of sample 0) is only there so
    that all ranks compute equally many forward passes. Randomness is the same each time."""
    keys = EvaluationSampler(plan, rank)
    return Batches(_loader(dataset, keys, seed, collate, config, device_type, lasting=False))


def _loader(
    dataset: Any,
    keys: Any,
    seed: int,
    collate: Callable[[list[Any]], Any],
    config: LoaderConfig,
    device_type: str,
    *,
    lasting: bool,
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
        # Without its own, DataLoader would draw from the global generator, which is the model's.
        generator=torch.Generator(),
        prefetch_factor=config.prefetch_factor,
        persistent_workers=config.persistent_workers and not lasting,
    )
    return loader


def _already_collated(loaded: Any) -> Any:
    """Collating is part of ``__getitems__``, so that its errors are caught there."""
    return loaded


def check_dataset(dataset: Any, name: str) -> None:
    """That it is a map-style dataset with samples; UsageError or DataError otherwise."""
    from torch.utils.data import IterableDataset

    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not map_style:
        raise UsageError(
            f"The task's {name}() returned a {type(dataset).__name__}, which is not a map-style "
            "dataset; give it __len__ and __getitem__(index), since only a sample that can be "
            "asked for by number can be found again after a restart, on any number of processes."
        )
    if len(dataset) == 0:
        raise DataError(f"The task's {name}() returned a dataset without samples; give it some.")
