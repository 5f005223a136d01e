"""Tensors go to disk and come back, and no pickle in a checkpoint is trusted."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint

from train.checkpoint import dcp
from train.checkpoint.store import DamagedError
from train.shard import Shard


def held(tensors):
    return {name: Shard.of(tensor) for name, tensor in tensors.items()}


def test_tensors_of_all_kinds_come_back(tmp_path):
    tensors = {
        "model.a": torch.randn(7, 3),
        "model.b": torch.randn(4).to(torch.bfloat16),
        "optim.step": torch.tensor(3.0),
        "model.empty": torch.empty(0, 5),
        "model.count": torch.arange(5),
    }
    dcp.write(held(tensors), tmp_path, None)
    assert dcp.shapes(tmp_path) == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    back = {name: torch.zeros_like(t) for name, t in tensors.items()}
    dcp.read(held(back), tmp_path, None)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_the_metadata_is_not_run(tmp_path):
    dcp.write(held({"a": torch.ones(2)}), tmp_path, None)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(DamagedError, match=r"not to be trusted: posix\.mkdir"):
        dcp.read(held({"a": torch.zeros(2)}), tmp_path, None)
    assert not (tmp_path / "pwned").exists()


def test_a_value_that_is_no_tensor_is_refused(tmp_path):
    values = {"a": torch.ones(2), "b": Evil(tmp_path / "pwned")}
    torch.distributed.checkpoint.save(values, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(DamagedError, match="'b', which is no tensor"):
        dcp.shapes(tmp_path)
    with pytest.raises(DamagedError, match="no tensor"):
        dcp.read({"a": torch.zeros(2), "b": object()}, tmp_path, None)  # type: ignore
    assert not (tmp_path / "pwned").exists()
