"""Start, failures and end of the worker processes of torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import multiprocessing.resource_tracker
import pickle
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from train.data.fetch import LoadFailure, kind_of
from train.exits import DataError, RetryError, RunError, UsageError, first_line, traceback_of
from train.process.parent import end_with_parent
from train.process.stop_signals import STOP_SIGNALS, stop_signals_blocked, unblock_stop_signals

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_GRACE = 1.0  # seconds that workers have to end by themselves


def start_workers(loader: DataLoader[Any]) -> Any:
    """The DataLoader's iterator, its workers not registered with torch's SIGCHLD handler.

    Raises UsageError if dataset or collate cannot be pickled, and RetryError if a worker cannot
    start.
    """
    from torch._C import _remove_worker_pids

    method = (loader.multiprocessing_context or multiprocessing).get_start_method()
    if loader.num_workers and method != "fork":
        # Otherwise the next lines start its process, and unblock some of the signals afterwards.
        with stop_signals_blocked():
            multiprocessing.resource_tracker.ensure_running()
    try:
        with stop_signals_blocked():  # until prepare_worker ignores them
            iterator: Any = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if not loader.num_workers or method == "fork":
            raise
        raise UsageError(
            f"The dataset or its collate cannot be pickled ({first_line(error)}), which the start "
            f"method {method} of data workers needs; define its classes and "
            "functions at the top level of a module, or set loader.multiprocessing_context=fork."
        ) from error
    except OSError as error:
        if not loader.num_workers:
            raise
        raise RetryError(
            f"A data worker cannot start ({error}); lower loader.workers (now "
            f"{loader.num_workers}), or raise the limits of processes and memory."
        ) from error
    if loader.num_workers:
        iterator._workers_done_event = _EventOfThisProcess(iterator._workers_done_event)
    if getattr(iterator, "_worker_pids_set", False):
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    return iterator


class _EventOfThisProcess:
    """An event between processes that only this one sets. So it knows the state without the lock,
    which a worker may have held when it was killed: torch asks for it when a worker has died."""

    def __init__(self, event: Any) -> None:
        self._event, self._is_set = event, False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._event.set()


def next_item(iterator: Any) -> Any:
    """The iterator's next item; only meanwhile are the workers registered with torch's SIGCHLD
    handler.

    The handler raises in the main thread when a worker dies. Here that prevents an endless wait for
    the message of a dead worker; in the middle of a training step it could not be handled.
    """
    workers = getattr(iterator, "_workers", ())
    if not workers:
        return next(iterator)
    from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids

    _set_worker_pids(id(iterator), tuple(worker.pid for worker in workers))
    try:
        _error_if_any_worker_fails()  # there is no signal for an earlier death
        return next(iterator)
    finally:
        _remove_worker_pids(id(iterator))


# What ends a worker by a signal, and what to do.
_BY_SIGNAL = {
    signal.SIGBUS: "/dev/shm is full, or a file that is mapped into memory was cut off: free space "
    "in /dev/shm or raise its size (docker run --shm-size), lower loader.workers, or restore the "
    "file",
    **dict.fromkeys(
        (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP),
        "native code of the dataset or of a library crashed: set loader.workers=0 and "
        "PYTHONFAULTHANDLER=1 to see where",
    ),
}


def failure_of_worker(iterator: Any, error: BaseException, timeout: float) -> RunError:
    """The error of a worker that has ended, or sends nothing within ``timeout`` seconds, for which
    torch has raised ``error``. A worker that code of the user has ended would end again."""
    ended = [w.exitcode for w in getattr(iterator, "_workers", ()) if w.exitcode]
    code = ended[0] if ended else 0
    what = f"A data worker failed ({first_line(error)})"
    if code > 0:
        return DataError(
            f"{what}: its exit code is {code}, so code of the dataset or of a library has ended "
            "it. Set loader.workers=0 to see where."
        )
    if -code in _BY_SIGNAL:
        number = signal.Signals(-code)
        return RetryError(f"{what} by {number.name}; {_BY_SIGNAL[number]}.")
    return RetryError(
        f"{what}; if it was killed for lack of memory or of space in /dev/shm, lower "
        f"loader.workers; if it was slow, raise loader.timeout (now {timeout:g} s)."
    )


def stop_workers(iterator: Any, *, failed: bool) -> None:
    """Ends the workers of a DataLoader's iterator, with SIGKILL after a grace period of 1 s.

    ``failed``: a worker has died, so torch's own shutdown could block.
    """
    workers = iterator._workers
    ending = None
    if not failed and all(worker.is_alive() for worker in workers):
        # In a thread, because torch waits 10 s for each worker that is busy in the user's code, and
        # without end for a lock that a worker held when it was killed.
        ending = threading.Thread(target=_shut_down, args=(iterator,), daemon=True)
        ending.start()
        ending.join(_GRACE)
    for worker in workers:
        worker.kill()
    if ending is not None:
        ending.join(_GRACE)
    iterator._shutdown = True  # torch would wait for messages that no worker completes
    for worker in workers:
        worker.join(_GRACE)


def _shut_down(iterator: Any) -> None:
    with suppress(Exception):  # the workers are killed in any case
        iterator._shutdown_workers()


def prepare_worker(_worker: int) -> None:
    """Ignores stop signals in a worker, since the main process still needs data for its last step;
    ends it with the main process; and reports a batch that cannot be pickled."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    unblock_stop_signals()
    # torch asks for the main process between two micro-batches only, and the user's code may hang.
    if parent := multiprocessing.parent_process():
        end_with_parent(signal.SIGKILL, parent.is_alive)
    # multiprocessing's hook for an item that cannot be pickled, which is otherwise dropped, so that
    # the main process would wait without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = _put_failure  # type: ignore[attr-defined]


def _put_failure(queue: Any, error: BaseException, item: Any) -> None:
    kind = kind_of(error)
    what = "cannot be pickled" if kind is DataError else "cannot be sent"
    remedy = (
        "return tensors and plain values from collate, or set loader.workers=0"
        if kind is DataError
        else "free space in /dev/shm or raise its size (docker run --shm-size), or lower "
        "loader.workers"
    )
    text = (
        f"A micro-batch of a data worker {what} ({type(error).__name__}: {first_line(error)}); "
        f"{remedy}."
    )
    details = traceback_of(error)
    queue.put((item[0], LoadFailure(text, details, kind, None)))
