"""The loader: samples and their randomness depend only on positions."""

import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from tests.data.loading import Numbers, evaluate, load
from train.data.order import SampleOrder, sample_seed


def by_position(batches):
    return {
        int(position): (int(index), tuple(noise.tolist()))
        for micro in batches
        for position, index, noise in zip(
            micro.positions, micro.batch["index"], micro.batch["noise"], strict=True
        )
    }


@pytest.mark.normal
@pytest.mark.parametrize(
    ("world", "micro", "workers"), [(1, 1, 0), (1, 4, 2), (2, None, 0), (3, 1, 1), (2, 2, 2)]
)
def test_samples_do_not_depend_on_workers(world, micro, workers):
    expected = by_position(load(Numbers()))
    assert sorted(expected) == list(range(48))
    assert len({noise for _, noise in expected.values()}) == 48, (
        "every epoch must draw other numbers"
    )
    found = {}
    for rank in range(world):
        found |= by_position(load(Numbers(), world=world, rank=rank, micro=micro, workers=workers))
    assert found == expected
    order = SampleOrder(1, 23)
    assert [found[p][0] for p in range(48)] == order.keys(np.arange(48))[1].tolist()


@pytest.mark.normal
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("world", "micro", "start"), [(1, 4, 0), (2, 1, 7), (2, 2, 10**12), (3, 2, 3), (6, None, 5)]
)
def test_ranks_together_load_each_step_exactly_once(world, micro, workers, start):
    order, steps = SampleOrder(1, 23), 5
    ranks = [
        load(
            Plain(), world=world, rank=rank, micro=micro, workers=workers, start=start, steps=steps
        )
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1, "ranks differ in their number of forward passes"
    accumulation = len(ranks[0]) // steps
    for step in range(steps):
        cells = [c for rank in ranks for c in rank[step * accumulation :][:accumulation]]
        pairs = [
            pair
            for cell in cells
            for pair in zip(
                cell.positions.tolist(), cell.indices.tolist(), cell.batch.tolist(), strict=True
            )
        ]
        positions = np.arange((start + step) * 6, (start + step + 1) * 6)
        indices = order.keys(positions)[1].tolist()
        assert sorted(pairs) == list(zip(positions.tolist(), indices, indices, strict=True))
        assert all(len(cell.positions) <= (micro or 6) for cell in cells)


def test_the_block_size_of_the_sampler_does_not_matter(monkeypatch):
    whole = by_position(load(Numbers(), steps=12, micro=2))
    monkeypatch.setattr("train.data.sampler._BLOCK", 30)  # five steps
    assert by_position(load(Numbers(), steps=12, micro=2)) == whole


def test_loading_can_start_at_any_position():
    whole = by_position(load(Numbers()))
    assert by_position(load(Numbers(), start=5, steps=3)) == {p: whole[p] for p in range(30, 48)}
    (far,) = load(Numbers(), start=10**12, steps=1)
    assert far.positions.tolist() == list(range(6 * 10**12, 6 * 10**12 + 6))


def test_the_random_numbers_of_a_sample_follow_from_its_seed():
    """Must not change: a resumed run must augment samples as before."""
    ((index, noise), *_) = by_position(load(Numbers(), start=4, steps=1)).values()
    seed = sample_seed(1, 1, index)
    expected = (
        torch.rand((), generator=torch.Generator().manual_seed(seed)).item(),
        random.Random(seed).random(),
        np.random.RandomState(seed % 2**32).rand(),
    )
    assert noise == expected


class Plain(Numbers):
    """Draws no random numbers."""

    deterministic = True

    def __getitem__(self, index):
        return index


def masking(samples):
    """Draws from all three generators, like the collate of a masked language model."""
    noise = [*torch.rand(2).tolist(), random.random(), *np.random.rand(2).tolist()]
    return {"index": torch.tensor(samples), "noise": noise}


@pytest.mark.normal
def test_random_numbers_in_collate_do_not_depend_on_workers():
    found = []
    for workers in (0, 1, 2, 0):
        torch.rand(3), random.random(), np.random.rand()
        found.append(
            [micro.batch["noise"] for micro in load(Plain(), workers=workers, collate=masking)]
        )
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(noise) for noise in found[0]}) == 8
    later = load(Plain(), start=5, steps=3, collate=masking)
    assert [micro.batch["noise"] for micro in later] == found[0][5:]


@pytest.mark.normal
@pytest.mark.parametrize(
    ("dataset", "collate", "workers"),
    [
        (Numbers(), default_collate, 0),
        (Numbers(), default_collate, 2),
        (Plain(), default_collate, 0),
        (Plain(), masking, 0),
    ],
)
def test_the_global_generators_are_not_changed(dataset, collate, workers):
    torch.rand(3), random.random()  # a state that no earlier load can have left
    np.random.randn()  # numpy draws pairs and keeps the other half in its state
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    half = np.random.get_state()[3:]
    load(dataset, collate=collate, workers=workers)
    assert np.random.get_state()[3:] == half
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize(("base", "asked"), [(Plain, [6] * 8), (Numbers, [])])
def test_getitems_is_used_only_for_deterministic_datasets(base, asked):
    """In other datasets each sample has its own seed, so samples are loaded one by one."""

    class Batched(base):
        asked = []

        def __getitems__(self, indices):
            self.asked.append(len(indices))
            return [self[index] for index in indices]

    found, expected = load(Batched()), load(base())
    assert Batched.asked == asked
    assert str([micro.batch for micro in found]) == str([micro.batch for micro in expected])


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_each_sample_once_on_any_number_of_ranks(world):
    seen, rounds, noise = [], set(), {}
    training = by_position(load(Numbers())).values()
    for rank in range(world):
        batches = evaluate(Numbers(), world=world, rank=rank)
        with batches:
            loaded = list(batches)
        rounds.add(len(loaded))
        for micro in loaded:
            if not micro.counts:
                assert micro.batch["index"].tolist() == [0]
            else:
                seen += micro.batch["index"].tolist()
                noise |= {i: n for i, (_, n) in by_position([micro]).items()}
    assert sorted(seen) == list(range(23))
    assert len(rounds) == 1
    assert len(set(noise.values())) == 23
    assert not set(noise.values()) & {n for _, n in training}
    assert noise[7][1] == random.Random(sample_seed(1, -1, 7)).random(), (
        "every evaluation must draw the same numbers"
    )


@pytest.mark.normal
def test_workers_end_on_close():
    pids = {int(pid) for micro in load(Numbers(), workers=2) for pid in micro.batch["pid"]}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.normal
def test_persistent_workers_live_until_close():
    batches = evaluate(Numbers(), workers=2, persistent_workers=True)
    pids, samples = [], []
    for _ in range(2):
        with batches:
            loaded = list(batches)
        pids.append({int(pid) for micro in loaded for pid in micro.batch["pid"]})
        samples.append(by_position(loaded))
    assert pids[0] == pids[1]
    assert len(pids[0] - {os.getpid()}) == 2
    assert samples[0] == samples[1]
    batches.close()
    for pid in pids[0]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
