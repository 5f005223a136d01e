"""DCP: tensors are saved and loaded, and no unsafe pickle is loaded."""

import errno
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint

from train.checkpoint import dcp
from train.checkpoint.store import DamagedError
from train.distributed.shard import Shard


def held(tensors):
    return {name: Shard.of(tensor) for name, tensor in tensors.items()}


def test_tensors_of_all_kinds_are_restored(tmp_path):
    tensors = {
        "model.a": torch.randn(7, 3),
        "model.b": torch.randn(4).to(torch.bfloat16),
        "optim.step": torch.tensor(3.0),
        "model.empty": torch.empty(0, 5),
        "model.count": torch.arange(5),
    }
    dcp.save(held(tensors), tmp_path, None)
    assert dcp.shapes(tmp_path) == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    back = {name: torch.zeros_like(t) for name, t in tensors.items()}
    dcp.load(held(back), tmp_path, None)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_the_metadata_is_not_run(tmp_path):
    dcp.save(held({"a": torch.ones(2)}), tmp_path, None)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(DamagedError, match=r"not safe to load: posix\.mkdir"):
        dcp.load(held({"a": torch.zeros(2)}), tmp_path, None)
    assert not (tmp_path / "pwned").exists()


class Attribute:
    def __init__(self, owner, name):
        self.arguments = (owner, name)

    def __reduce__(self):
        return getattr, self.arguments


def test_metadata_of_early_python_3_11_can_be_read(tmp_path, monkeypatch):
    """Python 3.11.2, for example, pickles an enum member as an attribute of its class."""
    formats = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    tensors = {"a": torch.randn(7, 3)}
    with monkeypatch.context() as patched:
        patched.setattr(
            formats, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
        )
        dcp.save(held(tensors), tmp_path, None)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    back = {"a": torch.zeros(7, 3)}
    dcp.load(held(back), tmp_path, None)
    assert torch.equal(back["a"], tensors["a"])


@pytest.mark.parametrize("name", ["__class__", "mro"])
@pytest.mark.parametrize("owner", ["_MEM_FORMAT_ENCODING", "Metadata"])
def test_getattr_in_a_pickle_is_limited_to_enum_members(tmp_path, owner, name):
    dcp.save(held({"a": torch.ones(2)}), tmp_path, None)
    owner = getattr(torch.distributed.checkpoint.metadata, owner)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(owner, name)))
    with pytest.raises(DamagedError, match=rf"{name} is not allowed in a checkpoint"):
        dcp.shapes(tmp_path)


def test_a_value_that_is_not_a_tensor_is_refused(tmp_path):
    values = {"a": torch.ones(2), "b": Evil(tmp_path / "pwned")}
    torch.distributed.checkpoint.save(values, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(DamagedError, match="'b', which is not a tensor"):
        dcp.shapes(tmp_path)
    with pytest.raises(DamagedError, match="not a tensor"):
        dcp.load({"a": torch.zeros(2), "b": object()}, tmp_path, None)  # type: ignore
    assert not (tmp_path / "pwned").exists()


def test_a_storage_error_while_loading_is_an_os_error(tmp_path, monkeypatch):
    """DCP wraps it in an exception that is no Exception."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    dcp.save(held({"a": torch.ones(3)}), tmp_path, None)

    def stale(self, plan, planner):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(FileSystemReader, "read_data", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        dcp.load(held({"a": torch.zeros(3)}), tmp_path, None)
