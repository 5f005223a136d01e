"""Loads the samples that the order names, in this process or in workers, the same either way.

torch's DataLoader moves the data; which samples and in which order is decided here, by position
alone, so that nothing depends on ranks, workers or restarts.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from train.data.fetch import EVALUATION, KeyedDataset, Keys, LoadFailure, MicroBatch
from train.data.ledger import sample_digests
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan
from train.exits import DataError, RetryError, UsageError, first_line
from train.section import Section

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = [
    "Batches",
    "LoaderConfig",
    "MicroBatch",
    "check_dataset",
    "evaluation_batches",
    "training_batches",
]

_GRACE = 1.0  # seconds that workers have to end by themselves
_BLOCK = 4096  # positions whose samples are looked up at once: numpy's overhead is per call


class LoaderConfig(Section):
    """How samples are loaded. None of this changes what is loaded."""

    workers: int = Field(0, ge=0)
    """Processes per rank that load beside the training; 0 loads within it."""

    prefetch_factor: int | None = Field(None, ge=1)
    """Micro-batches that each worker keeps ready; by default 2."""

    persistent_workers: bool = False
    """Keep evaluation's workers from one evaluation to the next. (Training's live throughout.)"""

    pin_memory: bool | Literal["auto"] = "auto"
    """Load into page-locked memory, which a GPU copies from faster; auto: if there is a GPU."""

    timeout: float = Field(0.0, ge=0.0)
    """Seconds to wait for a worker's micro-batch before the run ends with code 75; 0: for ever."""

    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers are started; null for the platform's default."""

    @model_validator(mode="after")
    def _check(self) -> LoaderConfig:
        if self.workers == 0:
            for name in (
                "prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context"
            ):  # fmt: skip
                if getattr(self, name):
                    raise ValueError(
                        f"loader.{name} is {getattr(self, name)!r}, but loader.workers is 0, and "
                        "without workers it means nothing; set loader.workers or unset it"
                    )
        return self


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

        def kill() -> None:
            for worker in iterator._workers:
                worker.kill()

        if self._failed:
            iterator._shutdown = True  # torch would wait, for messages that nobody completes
            kill()
            for worker in iterator._workers:
                worker.join(_GRACE)
            return

        # torch would wait ten seconds for each worker that is busy in the user's code.
        impatience = threading.Timer(_GRACE, kill)
        impatience.start()
        try:
            iterator._shutdown_workers()
        finally:
            impatience.cancel()
            kill()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises DataError where the dataset or collate failed, and RetryError where a worker died
        or did not answer in time.
        """
        try:
            if self._iterator is None:
                self._iterator = _start(self._loader)
            loaded = _next(self._iterator)
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


def _start(loader: DataLoader[Any]) -> Any:
    """Its iterator, whose workers torch's signal handler does not know of yet."""
    from torch._C import _remove_worker_pids

    try:
        iterator: Any = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        how = loader.multiprocessing_context or multiprocessing
        if not loader.num_workers or how.get_start_method() == "fork":
            raise
        raise UsageError(
            f"The dataset and its collate cannot be sent to a data worker ({first_line(error)}), "
            f"as {how.get_start_method()} of loader.multiprocessing_context needs; define what "
            "they consist of at the top of a module, or set loader.multiprocessing_context to fork."
        ) from error
    except OSError as error:
        if not loader.num_workers:
            raise
        raise RetryError(
            f"A data worker could not be started ({error}); use fewer loader.workers (now "
            f"{loader.num_workers}), or allow more processes and memory."
        ) from error
    if getattr(iterator, "_worker_pids_set", False):
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    return iterator


def _next(iterator: Any) -> Any:
    """Its next item, with torch's signal handler knowing of the workers meanwhile.

    The handler makes a worker's death raise wherever the main thread is. Here that is wanted: to
    wait for the rest of a message from a dead worker would be to wait for ever. In the middle of a
    training step it could not be dealt with.
    """
    workers = getattr(iterator, "_workers", ())
    if not workers:
        return next(iterator)
    from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids

    _set_worker_pids(id(iterator), tuple(worker.pid for worker in workers))
    try:
        _error_if_any_worker_fails()  # of a death before now there will be no signal
        return next(iterator)
    finally:
        _remove_worker_pids(id(iterator))


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
    keys = _TrainingKeys(order, plan, rank, start_position, steps)
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
    keys = _EvaluationKeys(plan, rank)
    return Batches(_loader(dataset, keys, seed, collate, config, device_type, lasting=False))


class _TrainingKeys:
    """Iterable over a rank's micro-batches, as keys; looks samples up in blocks of steps."""

    def __init__(
        self, order: SampleOrder, plan: BatchPlan, rank: int, start_position: int, steps: int
    ) -> None:
        self.order, self.plan, self.start, self.steps = order, plan, start_position, steps
        bounds = [plan.bounds(rank, micro) for micro in range(plan.accumulation)]
        self.offsets = np.concatenate([np.arange(*b, dtype=np.int64) for b in bounds])
        stops = np.cumsum([stop - start for start, stop in bounds]).tolist()
        self.parts = [slice(*bounds) for bounds in pairwise([0, *stops])]

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[Keys]:
        batch, mine = self.plan.global_batch_size, len(self.offsets)
        block = max(1, _BLOCK // mine)
        for first in range(0, self.steps, block):
            steps = np.arange(first, min(first + block, self.steps), dtype=np.int64)
            positions = self.start + steps[:, None] * batch + self.offsets
            epochs, indices = self.order.keys(positions)
            digests = sample_digests(positions, indices)
            for row in range(len(steps)):
                for part in self.parts:
                    digest = int(digests[row, part].sum(dtype=np.uint64))
                    yield Keys(positions[row, part], epochs[row, part], indices[row, part], digest)


class _EvaluationKeys:
    """Iterable over a rank's rounds of an evaluation, as keys."""

    def __init__(self, plan: EvalPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.rounds

    def __iter__(self) -> Iterator[Keys]:
        for number in range(self.plan.rounds):
            start, stop = self.plan.bounds(self.rank, number)
            indices = np.arange(start, stop, dtype=np.int64)
            counts = stop > start
            if not counts:
                indices = np.zeros(1, dtype=np.int64)
            epochs = np.full_like(indices, EVALUATION)
            yield Keys(indices, epochs, indices, 0, counts)


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
        worker_init_fn=_prepare_worker if workers else None,
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


def _prepare_worker(_worker: int) -> None:
    """Terminals and schedulers signal all processes, but stopping is the main process's affair:
    it still needs data for the step that it finishes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # multiprocessing's hook for what cannot be pickled: it would be dropped and waited for in vain.
    multiprocessing.queues.Queue._on_queue_feeder_error = _not_sendable  # type: ignore[attr-defined]


def _not_sendable(queue: Any, error: BaseException, item: Any) -> None:
    text = (
        f"A micro-batch cannot be sent from a data worker ({type(error).__name__}: "
        f"{first_line(error)}); let collate return tensors and plain values, or set "
        "loader.workers to 0."
    )
    details = "".join(traceback.format_exception(error))
    queue.put((item[0], LoadFailure(text, details, None)))


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
