"""Loading: what arrives depends on positions alone, and what fails is told clearly."""

import os
import random
import signal
import time
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from train.data.loader import LoaderConfig, check_dataset, evaluation_batches, training_batches
from train.data.order import SampleOrder
from train.data.plan import BatchPlan, EvalPlan
from train.exits import DataError, RetryError, UsageError


class Numbers(Dataset):
    """Index, three random numbers, and the process that loaded them."""

    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return {
            "index": index,
            "noise": torch.tensor(noise, dtype=torch.float64),
            "pid": os.getpid(),
        }


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


def load(
    dataset,
    *,
    world=1,
    rank=0,
    micro=None,
    workers=0,
    start=0,
    steps=8,
    collate=default_collate,
    **options,
):
    batches = training_batches(
        dataset,
        SampleOrder(1, len(dataset)),
        BatchPlan(6, micro, world),
        rank,
        collate=collate,
        config=LoaderConfig(workers=workers, **options),
        device_type="cpu",
        start_position=start * 6,
        steps=steps,
    )  # fmt: skip
    with batches:
        return list(batches)


def by_position(batches):
    return {
        int(position): (int(index), tuple(noise.tolist()))
        for micro in batches
        for position, index, noise in zip(
            micro.positions, micro.batch["index"], micro.batch["noise"], strict=True
        )
    }


@pytest.mark.parametrize(
    ("world", "micro", "workers"), [(1, 1, 0), (1, 4, 2), (2, None, 0), (3, 1, 1), (2, 2, 2)]
)
def test_samples_and_their_randomness_do_not_depend_on_who_loads(world, micro, workers):
    expected = by_position(load(Numbers()))
    assert sorted(expected) == list(range(48))
    assert len({noise for _, noise in expected.values()}) == 48, "each epoch has its own"
    found = {}
    for rank in range(world):
        found |= by_position(load(Numbers(), world=world, rank=rank, micro=micro, workers=workers))
    assert found == expected
    order = SampleOrder(1, 23)
    assert [found[p][0] for p in range(48)] == order.keys(np.arange(48))[1].tolist()


def test_it_can_begin_anywhere():
    whole = by_position(load(Numbers()))
    assert by_position(load(Numbers(), start=5, steps=3)) == {p: whole[p] for p in range(30, 48)}
    (far,) = load(Numbers(), start=10**12, steps=1)
    assert far.positions.tolist() == list(range(6 * 10**12, 6 * 10**12 + 6))


def test_the_global_generators_are_left_as_they_were():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load(Numbers())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()


def test_a_deterministic_dataset_is_asked_for_whole_batches():
    class Batched(Numbers):
        deterministic = True
        asked = []

        def __getitems__(self, indices):
            self.asked.append(len(indices))
            return [{"index": i} for i in indices]

    load(Batched())
    assert Batched.asked == [6] * 8


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_each_sample_once_on_any_number_of_ranks(world):
    seen, rounds, noise = [], set(), {}
    for rank in range(world):
        batches = evaluation_batches(
            Numbers(),
            EvalPlan(23, 4, world),
            rank,
            seed=1,
            collate=default_collate,
            config=LoaderConfig(),
            device_type="cpu",
        )
        with batches:
            loaded = list(batches)
        rounds.add(len(loaded))
        for micro in loaded:
            if micro.counts:
                seen += micro.batch["index"].tolist()
                noise |= {i: n for i, (_, n) in by_position([micro]).items()}
    assert sorted(seen) == list(range(23))
    assert len(rounds) == 1
    assert len(set(noise.values())) == 23


def fail():
    raise ValueError("the file is\nbroken")


def fail_oddly():
    raise Unpicklable("this", "that")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises_is_named(workers):
    with pytest.raises(DataError) as error:
        load(Broken(fail), workers=workers)
    assert "index 5 in epoch 0" in str(error.value)
    assert "Broken" in str(error.value)
    assert "ValueError" in str(error.value)
    assert "\n" not in str(error.value)
    assert "in fail" in "".join(traceback.format_exception(error.value)), "for the log"


def test_an_exception_that_cannot_be_pickled_is_told_all_the_same():
    with pytest.raises(DataError, match="Unpicklable: this that"):
        load(Broken(fail_oddly), workers=1)


def test_a_collate_that_raises_is_told():
    def collate(_samples):
        raise KeyError("label")

    with pytest.raises(DataError, match=r"joining \(collate\).*KeyError"):
        load(Numbers(), collate=collate)


def test_a_worker_that_is_killed_is_a_reason_to_try_again():
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RetryError, match=r"/dev/shm.*loader\.workers"):
        load(Broken(die), workers=1)


def test_a_worker_that_is_too_slow_is_a_reason_to_try_again():
    started = time.monotonic()
    with pytest.raises(RetryError, match=r"loader\.timeout"):
        load(Broken(lambda: time.sleep(60)), workers=1, timeout=1.0)
    assert time.monotonic() - started < 30, "a stuck worker is not waited for"


def test_workers_do_not_outlive_their_use():
    pids = {int(pid) for micro in load(Numbers(), workers=2) for pid in micro.batch["pid"]}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_persistent_workers_persist_until_closed():
    batches = evaluation_batches(
        Numbers(),
        EvalPlan(23, 4, 1),
        0,
        seed=1,
        collate=default_collate,
        config=LoaderConfig(workers=1, persistent_workers=True),
        device_type="cpu",
    )
    pids = []
    for _ in range(2):
        with batches:
            pids.append({int(pid) for micro in batches for pid in micro.batch["pid"]})
    assert pids[0] == pids[1] != {os.getpid()}
    batches.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0].pop(), 0)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_what_is_no_map_style_dataset_is_refused():
    for dataset in (Endless(), iter([1]), {1, 2}):
        with pytest.raises(UsageError, match=r"not a map-style dataset.*__getitem__"):
            check_dataset(dataset, "train_dataset")
    with pytest.raises(DataError, match="without samples"):
        check_dataset(Numbers(0), "train_dataset")
    check_dataset([1, 2], "train_dataset")


@pytest.mark.parametrize("option", ["prefetch_factor", "timeout", "persistent_workers"])
def test_options_of_workers_without_workers_are_refused(option):
    with pytest.raises(ValueError, match=rf"loader\.{option} .* loader\.workers is 0"):
        LoaderConfig(**{option: {"timeout": 1.0, "persistent_workers": True}.get(option, 2)})
