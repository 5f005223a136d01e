"""Which GPU a rank uses, with a fake of torch's CUDA functions."""

import threading
from types import SimpleNamespace

import pytest
import torch

from tests.support.ranks import on_ranks
from train.distributed import gpu
from train.distributed.world import World
from train.exits import UsageError


@pytest.fixture
def cuda(monkeypatch):
    """Eight GPUs; each thread has a current one, at first device 0."""
    local = threading.local()
    devices = SimpleNamespace(count=8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices.count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(local, "device", index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(local, "device", 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return devices


def world(rank=3, local_rank=3, *, guessed=False):
    return World(rank, 8, local_rank, 8, "srun", "here", guessed)


@pytest.mark.parametrize(
    ("of", "visible", "index"),
    [
        (world(), 8, 3),
        (world(), 1, 0),  # Slurm's --gpus-per-task=1
        (world(5, 5), 2, 1),  # --gpus-per-task=2
        (world(6, 0, guessed=True), 4, 2),  # no LOCAL_RANK: ranks are numbered host by host
    ],
)
def test_the_gpu_of_a_rank_and_what_the_libraries_read(cuda, of, visible, index):
    """DDP's device_ids and DeepSpeed's device come from LOCAL_RANK."""
    cuda.count = visible
    environ = {"LOCAL_RANK": str(of.local_rank), "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    gpu.use_gpu(of, environ, distributed=True)
    assert torch.cuda.current_device() == index
    assert environ == dict.fromkeys(environ, str(index))


def test_a_process_without_a_launcher_keeps_its_device_and_gets_no_local_rank(cuda):
    """Accelerate would start a process group for it."""
    torch.cuda.set_device(2)
    environ = {}
    gpu.use_gpu(World(0, 1, 0, 1, "python", "here"), environ, distributed=False)
    assert environ == {}
    assert torch.cuda.current_device() == 2
    gpu.use_gpu(World(0, 1, 0, 1, "python", "here"), environ, distributed=True)
    assert environ == {"LOCAL_RANK": "2"}
    assert torch.cuda.current_device() == 2


def test_another_thread_has_the_gpu_of_the_thread_that_starts_it(cuda):
    torch.cuda.set_device(5)
    found = []

    def record(name):
        found.append((name, torch.cuda.current_device()))

    for target in (record, gpu.with_current_gpu(record)):
        thread = threading.Thread(target=target, args=("writer",))
        thread.start()
        thread.join()
    assert found == [("writer", 0), ("writer", 5)]


@pytest.mark.parametrize(
    ("uuids", "guessed", "said"),
    [
        (["GPU-a", "GPU-b", "GPU-c"], False, None),
        (["GPU-a", "GPU-b", "GPU-a"], False, "Ranks 0, 2 have the same GPU (GPU-a); start"),
        (["GPU-a", "GPU-a", "GPU-a"], True, "(GPU-a), because LOCAL_RANK is not set; start"),
    ],
)
def test_ranks_with_the_same_gpu_are_refused_everywhere(monkeypatch, uuids, guessed, said):
    def properties(device):
        return SimpleNamespace(uuid=uuids[device.index])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    def check(collectives):
        device = torch.device("cuda", collectives.rank)
        of = world(collectives.rank, 0, guessed=guessed)
        gpu.check_own_gpus(collectives, of, device)

    for error in on_ranks(3, check):
        if said is None:
            assert error is None
        else:
            assert isinstance(error, UsageError)
            assert said in str(error)


def test_ranks_on_the_cpu_share_it():
    assert on_ranks(2, lambda c: gpu.check_own_gpus(c, world(), torch.device("cpu"))) == [None] * 2
