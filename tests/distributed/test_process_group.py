"""The end of process groups, and the collectives that a rank has called."""

import gc
import logging
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from train.distributed import process_group
from train.distributed.process_group import collectives_called, end_groups


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("failed", [True, False])
def test_process_groups_end(group, failed):
    end_groups(failed=failed)
    assert not dist.is_initialized()
    end_groups(failed=failed)


def test_groups_live_until_the_process_ends():
    """torch would destroy them with the interpreter's lock held, and could wait for ever."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    end_groups(failed=False)
    gc.collect()
    assert group() is not None


def test_each_group_counts_its_collectives(group):
    other = dist.new_group(backend="gloo")
    before = collectives_called()
    dist.all_reduce(torch.zeros(1), group=other)
    after = collectives_called()
    assert sum(after) > sum(before)
    assert collectives_called() == after


@pytest.mark.parametrize(
    ("failed", "ends"), [(True, "_abort_process_group"), (False, "destroy_process_group")]
)
def test_nccl_that_waits_for_another_rank_does_not_keep_the_process(
    group, monkeypatch, caplog, failed, ends
):
    """After an error it is aborted; in any case it is not waited for without end."""
    release, called = threading.Event(), []

    def block():
        called.append(threading.current_thread())
        release.wait(60)

    monkeypatch.setattr(process_group, "_has_nccl", lambda: True)
    module = dist.distributed_c10d if failed else dist
    monkeypatch.setattr(module, ends, block)
    with caplog.at_level(logging.WARNING, "train"):
        end_groups(failed=failed, limit=0.05)
    assert "did not end within 0.05 s" in caplog.text
    assert called[0].daemon, "it must not keep the process alive"
    release.set()
    called[0].join(60)
    monkeypatch.undo()


def test_an_error_while_groups_end_is_a_warning(group, monkeypatch, caplog):
    def fail():
        raise RuntimeError("ncclInternalError")

    monkeypatch.setattr(process_group, "_has_nccl", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
    with caplog.at_level(logging.WARNING, "train"):
        end_groups(failed=True)
    assert "the process groups did not end: ncclInternalError" in caplog.text
