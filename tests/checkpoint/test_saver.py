"""The saver: training waits only for the copy, and failed writes are reported."""

import signal
import threading
import time

import pytest
import torch

from train.checkpoint import dcp
from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.saver import CheckpointSaver, SaveRequest
from train.checkpoint.store import CheckpointStore
from train.distributed.collectives import Collectives
from train.distributed.shard import Shard

ALONE = Collectives(0, 1)


def held(tensors):
    return {name: Shard.of(tensor) for name, tensor in tensors.items()}


def request(step, before_commit=lambda: None):
    return SaveRequest(step=step, state={"n": step}, metrics=None, before_commit=before_commit)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def stored(store, step, like):
    back = {name: torch.zeros_like(t) for name, t in like.items()}
    dcp.load(held(back), store.path(step), None)
    return back


def test_training_may_change_tensors_during_the_write(store):
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    tensors = {"a": torch.ones(1000), "b": torch.tensor(5)}
    gate = threading.Event()
    assert saver.save(held(tensors), request(1, before_commit=gate.wait)) is None
    assert saver.in_flight
    tensors["a"].fill_(7.0)  # training continues
    assert store.steps() == []
    gate.set()
    assert saver.wait() is None
    assert store.steps() == [1]
    assert torch.equal(stored(store, 1, tensors)["a"], torch.ones(1000))
    assert saver.last_step == 1


def test_the_threads_use_the_device_of_the_training(store, monkeypatch):
    """The current device of a new thread is device 0, where each rank would get a context."""
    chosen = {}

    def choose(device):
        chosen.setdefault(threading.current_thread().name, device)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    shards = held({"a": torch.ones(10)})
    saver.reserve(shards)
    saver.save(shards, request(1))
    assert saver.wait() is None
    assert chosen == {"reserve": 5, "checkpoint": 5}


def test_only_one_checkpoint_is_in_flight(store):
    saver = CheckpointSaver(store, CheckpointConfig(keep_last=5), ALONE)
    committed_before = []
    for step in range(1, 5):
        asked = request(step, lambda: committed_before.append(store.steps()))
        assert saver.save(held({"a": torch.full((10,), float(step))}), asked) is None
    saver.wait()
    assert committed_before == [[], [1], [1, 2], [1, 2, 3]]
    assert store.steps() == [1, 2, 3, 4]
    assert stored(store, 3, {"a": torch.zeros(10)})["a"][0] == 3.0


@pytest.fixture
def interrupt():
    """Raises KeyboardInterrupt in the main thread, also while it waits."""

    def raise_it(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, raise_it)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)


def later(*calls):
    """Makes the calls in another thread, after this one has begun to wait."""

    def work():
        for call in calls:
            time.sleep(0.1)
            call()

    threading.Thread(target=work).start()


def test_an_interrupted_wait_leaves_the_checkpoint_in_flight(store, interrupt):
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    gate = threading.Event()
    saver.save(held({"a": torch.ones(3)}), request(1, before_commit=gate.wait))
    later(interrupt)
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    assert saver.in_flight
    later(interrupt, gate.set)
    with pytest.raises(KeyboardInterrupt):
        saver.close()
    assert store.steps() == [1], "close must not return before the writing thread has ended"
    assert not saver.in_flight


@pytest.mark.parametrize("begins", [False, True])
def test_an_interrupted_start_of_the_writing_thread(store, monkeypatch, begins):
    """KeyboardInterrupt may come before the thread has begun or after it."""
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    start, writing = threading.Thread.start, threading.Event()

    def interrupted(thread):
        if begins:
            start(thread)
            assert writing.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.save(held({"a": torch.ones(3)}), request(1, before_commit=writing.set))
    saver.close()
    assert not saver.in_flight
    assert store.steps() == ([1] if begins else [])


def test_blocking_mode_returns_with_the_checkpoint_committed(store):
    saver = CheckpointSaver(store, CheckpointConfig(asynchronous=False), ALONE)
    assert saver.save(held({"a": torch.ones(3)}), request(1)) is None
    assert store.steps() == [1]


def test_a_failed_write_is_reported_and_older_checkpoints_stay(store, monkeypatch):
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    saver.save(held({"a": torch.ones(3)}), request(1))

    def no_space():
        raise OSError(28, "No space left on device")

    assert saver.save(held({"a": torch.ones(3)}), request(2, before_commit=no_space)) is None
    error = saver.wait()
    assert error is not None
    assert "No space left on device" in error
    assert store.steps() == [1]
    assert [p.name for p in store.directory.iterdir()] == ["step-000000000001"]
    assert saver.last_step == 1
    assert saver.save(held({"a": torch.ones(3)}), request(3)) is None
    assert saver.wait() is None
    assert store.steps() == [1, 3]


def test_any_error_of_the_writer_is_a_failed_save(store, monkeypatch):
    """Covers errors within a phase of the save, a lost peer during the exchange of errors, and a
    disk error during the removal of the incomplete checkpoint."""
    collectives = Collectives(0, 1)
    saver = CheckpointSaver(store, CheckpointConfig(), collectives)

    def gone(value):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(collectives, "all_gather_object", gone)
    saver.save(held({"a": torch.ones(3)}), request(1))
    assert "Connection closed by peer" in saver.wait()
    assert saver.last_step is None

    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "remove_incomplete", fails)
    saver.save(held({"a": torch.ones(3)}), request(2, before_commit=fails))
    assert "Input/output error" in saver.wait()
    assert saver.last_step is None


def test_a_failed_removal_is_not_a_failed_save(store, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "prune", fails)
    saver = CheckpointSaver(store, CheckpointConfig(), ALONE)
    saver.save(held({"a": torch.ones(3)}), request(1))
    assert saver.wait() is None
    assert saver.last_step == 1
