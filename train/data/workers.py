"""The worker processes of torch's DataLoader: how they start, fail and end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import pickle
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any

from train.data.fetch import LoadFailure
from train.exits import RetryError, UsageError, first_line

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_GRACE = 1.0  # seconds that workers have to end by themselves


def start_workers(loader: DataLoader[Any]) -> Any:
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


def next_item(iterator: Any) -> Any:
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


def stop_workers(iterator: Any, *, failed: bool) -> None:
    """Ends the workers of a DataLoader's iterator, with SIGKILL after a grace period of 1 s.

    ``failed``: a worker has died, so torch's own shutdown could block.
    """

    def kill() -> None:
        for worker in iterator._workers:
            worker.kill()

    if failed:
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


def prepare_worker(_worker: int) -> None:
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
