"""Shards: full tensors, chunks and ranges of elements."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from train.distributed.shard import Shard, chunks_of_range


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_range_splits_into_few_chunks_with_exactly_its_elements(shape, data):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    boxes = chunks_of_range(tuple(shape), start, stop)
    found = [
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in boxes
    ]
    assert torch.cat([*found, torch.empty(0, dtype=torch.int64)]).tolist() == list(
        range(start, stop)
    )
    assert len(boxes) <= 2 * len(shape) - 1


def test_views_of_a_range_share_its_memory():
    memory = torch.arange(7.0)
    shard = Shard(torch.Size([3, 5]), memory, start=3)
    views = {offsets: view for (offsets, _), view in shard.chunks()}
    assert {offsets: tuple(view.shape) for offsets, view in views.items()} == {
        (0, 3): (1, 2),
        (1, 0): (1, 5),
    }
    views[(1, 0)].fill_(9)
    assert memory.tolist() == [0, 1, 9, 9, 9, 9, 9]


def test_a_plain_tensor_is_a_full_shard():
    tensor = torch.zeros(2, 3)
    [(box, view)] = Shard.of(tensor).chunks()
    assert box == ((0, 0), (2, 3))
    assert view.data_ptr() == tensor.data_ptr()


def test_a_scalar_and_an_empty_tensor_have_one_chunk():
    assert [box for box, _ in Shard.of(torch.tensor(3.0)).chunks()] == [((), ())]
    assert [box for box, _ in Shard.of(torch.zeros(0, 4)).chunks()] == [((0, 0), (0, 4))]


def test_a_shard_may_be_empty():
    assert list(Shard(torch.Size([3, 5]), torch.empty(0, 5), (3, 0)).chunks()) == []
    assert list(Shard(torch.Size([3, 5]), torch.empty(0), start=15).chunks()) == []
