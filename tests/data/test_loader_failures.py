"""Errors during loading are reported immediately, with their cause."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.data.loading import Numbers, evaluate, load, make
from tests.support.lanes import slow
from tests.support.runs import is_running
from train.data.loader import check_dataset
from train.data.loader_config import LoaderConfig
from train.data.order import SampleOrder
from train.exits import DataError, OutOfMemoryError, RetryError, RunError, UsageError
from train.process.stop_signals import STOP_SIGNALS


class Broken(Numbers):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getitem__(self, index):
        if index == 5:
            self.how()
        return super().__getitem__(index)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def fail():
    raise ValueError("the file is\nbroken")


def fail_oddly():
    raise Unpicklable("this", "that")


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises_is_named(workers):
    with pytest.raises(DataError) as error:
        load(Broken(fail), workers=workers)
    (position,) = np.flatnonzero(SampleOrder(1, 23).keys(np.arange(23))[1] == 5)
    assert str(error.value) == (
        f"The dataset Broken failed at index 5 in epoch 0 (position {position} of the stream) "
        "with ValueError: the file is broken; fix or remove this sample."
    )
    assert "in fail" in "".join(traceback.format_exception(error.value)), (
        "the traceback for the log is lost"
    )


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_when_its_batch_is_due(workers):
    """The run fails at the same step for any number of prefetched batches."""
    good = []
    with pytest.raises(DataError), make(Broken(fail), workers=workers) as batches:
        good += (micro.indices.tolist() for micro in batches)
    indices = SampleOrder(1, 23).keys(np.arange(48))[1].reshape(8, 6).tolist()
    assert good == indices[: next(step for step, row in enumerate(indices) if 5 in row)]


class PanicException(BaseException):
    """As the bindings of libraries in Rust raise it."""


def panic():
    raise PanicException("index out of bounds")


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_exception_is_reported(workers):
    with pytest.raises(DataError, match="PanicException: index out of bounds"):
        load(Broken(panic), workers=workers)


@pytest.mark.normal
def test_an_exception_that_cannot_be_pickled_is_reported():
    with pytest.raises(DataError, match="Unpicklable: this that"):
        load(Broken(fail_oddly), workers=1)


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_collate_is_reported(workers):
    def collate(_samples):
        raise KeyError("label")

    expected = r"failed in collate of .*in epoch 0 \(positions 6 to 11 of the stream\).*KeyError"
    with pytest.raises(DataError, match=expected):
        load(Numbers(), start=1, collate=collate, workers=workers)


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_iteration_does_not_end_the_training_silently(workers):
    with pytest.raises(DataError, match="StopIteration: no more"):
        load(Broken(no_more), workers=workers)


def no_more():
    raise StopIteration("no more")


def test_an_interrupt_stays_an_interrupt():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(Broken(interrupt))


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.normal
def test_an_interrupt_that_a_worker_raises_is_an_error_of_the_sample():
    """A worker ignores SIGINT, and torch would take its end for that of a killed one."""
    with pytest.raises(DataError, match="at index 5 .* with KeyboardInterrupt"):
        load(Broken(interrupted), workers=1)


class WithoutText(Exception):
    def __str__(self):
        return self.missing


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_without_a_text_is_reported(workers):
    def fail():
        raise WithoutText

    with pytest.raises(DataError, match="WithoutText, whose str.. fails with AttributeError"):
        load(Broken(fail), workers=workers)


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_quotes_the_data_is_shortened(workers):
    def fail():
        raise ValueError("word " * 2**20)

    with pytest.raises(DataError) as error:
        load(Broken(fail), workers=workers)
    assert "characters) ..." in str(error.value)
    assert len(str(error.value)) < 3_000
    assert len(str(error.value.__cause__)) < 200_000 or workers == 0


@pytest.mark.normal
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stuck_worker_ends_with_a_killed_main_process():
    """It ignores stop signals, and would hold its memory until the user's code returns."""
    stuck, pids = multiprocessing.Event(), multiprocessing.SimpleQueue()

    def wait():
        pids.put(os.getpid())
        stuck.set()
        time.sleep(600)

    main = os.fork()
    if main == 0:
        try:
            load(Broken(wait), workers=1)
        finally:
            os._exit(1)
    assert stuck.wait(20)
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    worker = pids.get()
    deadline = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker has survived"
        time.sleep(0.01)


def test_an_error_during_evaluation_is_named_as_such():
    batches = evaluate(Broken(fail))
    with pytest.raises(DataError, match="index 5 in the evaluation with ValueError"), batches:
        list(batches)


@pytest.mark.normal
def test_a_batch_that_cannot_be_pickled_is_an_error():
    def collate(_samples):
        return lambda: None

    with pytest.raises(DataError, match=r"of a data worker cannot be pickled \(.*pickle"):
        load(Numbers(), collate=collate, workers=1)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_dataset_that_cannot_be_pickled_is_an_error():
    class Local(Numbers):
        pass

    with pytest.raises(
        UsageError,
        match=r"Local.*the start method spawn of data workers.*loader\.multiprocessing_context",
    ):
        load(Local(), workers=1, multiprocessing_context="spawn")


@pytest.mark.normal
def test_a_killed_worker_is_a_retry_error():
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RetryError, match=r"/dev/shm.*loader\.workers"):
        load(Broken(die), workers=1)


class Stuck(Numbers):
    def __getitem__(self, index):
        time.sleep(600)


def test_a_worker_timeout_is_a_retry_error():
    started = time.monotonic()
    with pytest.raises(RetryError, match=r"loader\.timeout \(now 0\.5 s\)"):
        load(Stuck(), workers=2, timeout=0.5)
    assert time.monotonic() - started < 60, "it waited for stuck workers"
    assert not multiprocessing.active_children()


def test_a_stuck_worker_is_killed_on_close():
    stuck = multiprocessing.Event()

    def wait():
        stuck.set()
        time.sleep(600)

    with make(Broken(wait), workers=1) as batches:
        pid = int(next(batches).batch["pid"][0])
        assert stuck.wait(20)
        started = time.monotonic()
    assert time.monotonic() - started < 60, "it waited for the stuck worker"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.normal
def test_a_dead_worker_raises_only_where_batches_are_fetched():
    """Even if a DataLoader of the user has installed torch's signal handler."""
    list(DataLoader([1, 2], num_workers=1))
    with make(Numbers(), workers=1, steps=1000) as batches:
        os.kill(int(next(batches).batch["pid"][0]), signal.SIGKILL)
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:  # such as a forward pass
            torch.ones(3).sum()
        with pytest.raises(RetryError, match="killed by signal|exited unexpectedly"):
            list(batches)


def many_tensors(samples):
    """Each goes through its own socket."""
    return {f"tensor {number}": torch.full((4,), number) for number in range(40)}


def long_message(samples):
    """Goes through the pipe, which holds 64 KiB."""
    return b"x" * 2**20


@pytest.mark.slow
@pytest.mark.normal
@pytest.mark.timeout(60)
@pytest.mark.parametrize("collate", [slow((many_tensors,)), long_message])
def test_a_worker_that_dies_during_a_send_is_a_retry_error(collate):
    for _ in range(8):
        others = set(multiprocessing.active_children())
        with make(Numbers(), workers=2, steps=1000, collate=collate) as batches:
            next(batches)
            victim = (set(multiprocessing.active_children()) - others).pop()
            threading.Timer(0.02 * random.random(), victim.kill).start()
            started = time.monotonic()
            with pytest.raises(RetryError, match=r"/dev/shm.*loader\.workers"):  # noqa: PT012
                while time.monotonic() < started + 30:
                    next(batches)
        victim.join(5)
        assert victim.exitcode == -signal.SIGKILL


@pytest.mark.normal
@pytest.mark.timeout(60)
def test_an_incomplete_message_of_a_dead_worker_does_not_block():
    others = set(multiprocessing.active_children())
    with make(Numbers(), workers=1, steps=10, collate=long_message) as batches:
        next(batches)
        time.sleep(0.3)  # it has written what the pipe holds of the next one, and waits
        (set(multiprocessing.active_children()) - others).pop().kill()
        time.sleep(0.1)
        started = time.monotonic()
        with pytest.raises(RetryError):
            list(batches)
    assert time.monotonic() - started < 30


@pytest.mark.slow
@pytest.mark.normal
@pytest.mark.timeout(60)
@pytest.mark.parametrize("dies", [False, True])
def test_a_lock_that_a_killed_worker_held_blocks_neither_the_next_batch_nor_the_end(dies):
    others = set(multiprocessing.active_children())
    started = time.monotonic()
    with make(Numbers(), workers=2, steps=1000) as batches:
        next(batches)
        # As a worker does before each sample; killed there, it leaves the lock acquired.
        batches._iterator._workers_done_event._event._cond.acquire()
        if dies:
            (set(multiprocessing.active_children()) - others).pop().kill()
            with pytest.raises(RetryError, match=r"/dev/shm.*loader\.workers"):  # noqa: PT012
                while time.monotonic() < started + 30:
                    next(batches)
    assert time.monotonic() - started < 30
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.normal
def test_workers_ignore_stop_signals():
    with make(Numbers(), workers=1, steps=20) as batches:
        pid = int(next(batches).batch["pid"][0])
        for number in STOP_SIGNALS:
            os.kill(pid, number)
        assert {int(p) for micro in batches for p in micro.batch["pid"]} == {pid}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_stop_signal_while_a_worker_starts_does_not_end_it(method):
    """A launcher signals a whole group of processes."""
    before = set(multiprocessing.active_children())
    with make(Numbers(), workers=2, steps=5, multiprocessing_context=method) as batches:
        for worker in set(multiprocessing.active_children()) - before:
            for number in STOP_SIGNALS:
                os.kill(worker.pid, number)
        assert len(list(batches)) == 5


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_only_map_style_datasets_are_accepted():
    for dataset in (Endless(), iter([1]), {1, 2}):
        with pytest.raises(UsageError, match=r"not a map-style dataset.*__getitem__"):
            check_dataset(dataset, "train_dataset")
    with pytest.raises(DataError, match="empty dataset"):
        check_dataset(Numbers(0), "train_dataset")
    check_dataset([1, 2], "train_dataset")


class Lengthless(Numbers):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        if self.length is None:
            raise TypeError("object of type 'Reader' has no len()")
        return self.length


@pytest.mark.parametrize("length", [None, -1, 2.5, "3", 2**70])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(UsageError, match=r"a Lengthless whose __len__ fails \(.+\); return the"):
        check_dataset(Lengthless(length), "eval_dataset")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prefetch_factor", 2),
        ("timeout", 1.0),
        ("persistent_workers", True),
        ("multiprocessing_context", "spawn"),
    ],
)
def test_options_of_workers_without_workers_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"loader\.{option} .* loader\.workers is 0"):
        LoaderConfig(**{option: value})
    LoaderConfig(workers=1, **{option: value})


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (OSError(errno.EIO, "Input/output error"), RetryError, "fix the cause, then rerun"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), RetryError, "not the data"),
        (MemoryError("no"), OutOfMemoryError, "lower loader.workers"),
        (FileNotFoundError(errno.ENOENT, "No such file"), DataError, "fix or remove this sample"),
        (KeyError("x"), DataError, "fix or remove this sample"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_error_of_a_dataset_says_whose_fault_it_is(workers, error, kind, remedy):
    def fail():
        raise error

    with pytest.raises(RunError, match=f"The dataset Broken failed at index 5 .*{remedy}") as found:
        load(Broken(fail), workers=workers)
    assert type(found.value) is kind


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "if it was killed for lack of memory or of space in /dev/shm, lower"),
        (signal.SIGBUS, "by SIGBUS; /dev/shm is full, or a file that is mapped"),
        (signal.SIGSEGV, "by SIGSEGV; native code of the dataset or of a library crashed: set"),
        (signal.SIGABRT, "by SIGABRT; native code of the dataset or of a library crashed: set"),
    ],
)
def test_the_signal_that_ended_a_worker_says_what_to_do(number, told):
    with pytest.raises(RetryError, match=told):
        load(Broken(lambda: os.kill(os.getpid(), number)), workers=1)


@pytest.mark.process
def test_a_worker_that_code_of_the_dataset_ends_is_a_fault_of_the_data():
    """A retry would end in the same way."""
    with pytest.raises(DataError, match="its exit code is 3, so code of the dataset"):
        load(Broken(lambda: os._exit(3)), workers=1)


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 1])
def test_a_breakpoint_without_a_terminal_is_named(workers, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    told = "at index 5 .* with BdbQuit .*; remove the breakpoint, or use it on a terminal"
    with pytest.raises(DataError, match=told):
        load(Broken(breakpoint), workers=workers)
