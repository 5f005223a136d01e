"""The end of process groups, and the collectives that a rank has called."""

import logging
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from tests.support.forked import quick
from train.distributed import process_group
from train.distributed.process_group import collectives_called, end_groups

ROUNDS = """
import torch, torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel
from train.distributed.process_group import end_groups

def train():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    dist.all_reduce(torch.ones(1))
    end_groups(failed=False)

for _ in range(30):
    train()
"""


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


def test_the_end_of_a_group_does_not_wait_for_its_last_collective(tmp_path):
    """torch destroys a group with the interpreter's lock held. Without the mend, one of the first
    of these rounds never ends."""
    script = tmp_path / "ends.py"
    script.write_text(ROUNDS)
    done = subprocess.run(**quick([sys.executable, str(script)]), timeout=60, check=False)
    assert done.returncode == 0


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
