"""DCP: tensors are saved and loaded, and no unsafe pickle is loaded."""

import errno
import io
import json
import pickle
import zipfile
from contextlib import suppress

import pytest
import torch
import torch.distributed.checkpoint

from tests.support.hostile import Evil
from train.checkpoint import dcp
from train.checkpoint.damage import DamagedError
from train.checkpoint.index import item_size, read_index
from train.checkpoint.stored_tensor import check_tensors
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


def former(directory, tensors):
    """Saves them as earlier versions did: with no other index than DCP's pickle."""
    dcp.save(held(tensors), directory, None)
    (directory / "index.json").unlink()


def test_a_pickle_with_code_in_the_metadata_is_not_run(tmp_path):
    former(tmp_path, {"a": torch.ones(2)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(DamagedError, match=r"not safe to load: 'posix\.mkdir'"):
        dcp.load(held({"a": torch.zeros(2)}), tmp_path, None)
    assert not (tmp_path / "pwned").exists()


def test_metadata_of_early_python_3_11_can_be_read(tmp_path, monkeypatch):
    """Python 3.11.2, for example, pickles an enum member as an attribute of its class."""
    formats = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    tensors = {"a": torch.randn(7, 3)}
    with monkeypatch.context() as patched:
        patched.setattr(
            formats, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
        )
        former(tmp_path, tensors)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    back = {"a": torch.zeros(7, 3)}
    dcp.load(held(back), tmp_path, None)
    assert torch.equal(back["a"], tensors["a"])


METADATA = "torch.distributed.checkpoint.metadata"


def build_on(global_name):
    """A pickle that sets an attribute of a class or function of this name."""
    module, _, name = global_name.rpartition(".")
    changed = b"}X\x07\x00\x00\x00versionX\x01\x00\x00\x00xsb."
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + changed


@pytest.mark.parametrize(
    "target",
    [
        f"{METADATA}.Metadata",
        f"{METADATA}._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        "builtins.getattr",
    ],
)
def test_a_pickle_changes_no_class_and_no_function(tmp_path, target):
    former(tmp_path, {"a": torch.ones(2)})
    (tmp_path / ".metadata").write_bytes(build_on(target))
    with pytest.raises(DamagedError, match="changes something that no metadata has"):
        dcp.shapes(tmp_path)
    assert torch.distributed.checkpoint.metadata.Metadata.version is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b".",
        b"garbage",
        b"\x80\x04N.",
        b"\x80\x04}.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R.",  # torch.load("x")
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01x\x85R.",
        b"\x80\x04" + b"(" * 1000 + b".",
        b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.",  # the key is nested 100,000 times
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of 4 billion entries
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # announces 2**63 bytes
        b"cos\nsystem\n(S'x'\ntR.",
        b"(S'x'\nios\nsystem\n.",
        b"Pid\n.",
        b"\x80\x04\x82\x01.",
    ],
)
def test_any_other_pickle_is_refused(tmp_path, text):
    former(tmp_path, {"a": torch.ones(2)})
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(DamagedError, match=r"\.metadata cannot be used \("):
        dcp.shapes(tmp_path)


def test_an_index_of_an_earlier_version_is_read_without_loading_a_pickle(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(7, 3), "b": torch.tensor(2.0), "c": torch.empty(0, 5)}
    former(tmp_path, tensors)
    with monkeypatch.context() as patched:
        patched.setattr(pickle, "load", None)
        patched.setattr(pickle, "loads", None)
        patched.setattr(pickle, "Unpickler", None)
        assert dcp.shapes(tmp_path) == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    back = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(held(back), tmp_path, None)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def change_index(directory, change):
    path = directory / "index.json"
    values = json.loads(path.read_text())
    change(values, values["tensors"]["a"], values["tensors"]["a"]["chunks"][0])
    path.write_text(json.dumps(values))


def top(**values):
    """A change of the index."""
    return lambda index, tensor, chunk: index.update(values)


def tensor(**values):
    """A change of the entry of a tensor in the index."""
    return lambda index, tensor, chunk: tensor.update(values)


def chunk(**values):
    """A change of the entry of a chunk in the index."""
    return lambda index, tensor, chunk: chunk.update(values)


@pytest.mark.parametrize(
    "change",
    [
        *(
            chunk(file=file)
            for file in (
                "../outside.distcp", "/etc/passwd", "sub/__0_0.distcp", "..", "", "a\0b",
                "other.distcp", "\ud800", 5,
            )
        ),
        chunk(at=-1),
        chunk(at=1 << 40),
        chunk(length=1 << 40),
        chunk(length=8),
        chunk(length=True),
        chunk(offsets=[1, 0]),
        chunk(offsets=[0]),
        chunk(sizes=[4, 3]),
        chunk(sizes=[1 << 61, 1 << 61]),
        chunk(sizes=[0, 3]),
        chunk(sizes="73"),
        chunk(sizes=[1] * 1000),
        tensor(chunks=[]),
        tensor(chunks={}),
        tensor(chunks=[None]),
        tensor(shape=[70, 3]),
        tensor(shape=[-7, 3]),
        tensor(dtype="complex128", shape=[700, 300]),
        tensor(dtype="load"),
        tensor(dtype="__doc__"),
        tensor(dtype=None),
        top(format=2),
        top(tensors=[]),
        top(tensors={"a": None}),
        lambda index, tensor, chunk: tensor["chunks"].append(chunk),
        lambda index, tensor, chunk: chunk.pop("file"),
    ],
)  # fmt: skip
def test_an_index_that_leaves_its_files_or_its_tensors_is_refused(tmp_path, change):
    (tmp_path / "outside.distcp").write_bytes(bytes(10_000))
    directory = tmp_path / "step"
    dcp.save(held({"a": torch.randn(7, 3)}), directory, None)
    (directory / "sub").mkdir()
    (directory / "sub/__0_0.distcp").write_bytes((directory / "__0_0.distcp").read_bytes())
    change_index(directory, change)
    with pytest.raises(DamagedError):
        dcp.shapes(directory)
    with pytest.raises(DamagedError):
        dcp.load(held({"a": torch.zeros(7, 3)}), directory, None)


def test_the_bytes_of_every_dtype_are_known():
    dtypes = {v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    named = {dtype: item_size(str(dtype).removeprefix("torch.")) for dtype in dtypes}
    assert named == {dtype: dtype.itemsize for dtype in dtypes}
    assert len(named) > 20
    assert [item_size(name) for name in ("load", "int0", "int", "float3200", "", "Tensor")] == [
        None
    ] * 6


@pytest.mark.parametrize("dtype", ["complex128", "load"])
def test_a_dtype_for_which_the_data_is_too_short_is_found_without_torch(tmp_path, dtype):
    """As `isorun verify` reads an index."""
    dcp.save(held({"a": torch.randn(700, 3)}), tmp_path, None)
    change_index(tmp_path, tensor(dtype=dtype))
    files = {path.name: {"size": path.stat().st_size} for path in tmp_path.iterdir()}
    with pytest.raises(DamagedError, match="too few|unknown"):
        read_index(tmp_path, files)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": 1}', "\xff"])
def test_an_index_of_any_other_form_is_refused(tmp_path, text):
    dcp.save(held({"a": torch.ones(2)}), tmp_path, None)
    (tmp_path / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedError, match=r"index\.json cannot be used \("):
        dcp.shapes(tmp_path)


@pytest.mark.parametrize("at", range(0, 1200, 60))
def test_bytes_that_are_no_tensor_are_damage(tmp_path, at):
    dcp.save(held({"a": torch.randn(7, 3)}), tmp_path, None)
    path = tmp_path / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"\xff" * len(data[at : at + 40])
    path.write_bytes(data)
    with suppress(DamagedError):  # the padding has no meaning
        dcp.load(held({"a": torch.zeros(7, 3)}), tmp_path, None)


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path):
    directory = tmp_path / "step"
    dcp.save(held({"a": torch.ones(2)}), directory, None)
    (directory / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (directory / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((DamagedError, OSError)):
        dcp.load(held({"a": torch.zeros(2)}), directory, None)


def test_a_value_that_is_not_a_tensor_is_refused(tmp_path):
    values = {"a": torch.ones(2), "b": Evil(tmp_path / "pwned")}
    torch.distributed.checkpoint.save(values, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(DamagedError, match="'b' is not a tensor"):
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


def compressed(data):
    """The same zip file with compression, and as many bytes as before."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry.filename)
            new.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)
        new.writestr("padding", bytes(len(data)))
    return out.getvalue()


def twice(data):
    """A zip file that lists its largest entry twice."""
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as file:
        file.filelist.append(max(file.filelist, key=lambda entry: entry.file_size))
        file.writestr("more", b"")
    return out.getvalue()


def in_the_former_form(data):
    out = io.BytesIO()
    torch.save(torch.load(io.BytesIO(data)), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def many_entries(data):
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as file:
        for number in range(3000):
            file.writestr(f"entry {number}", b"")
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (compressed, "it is compressed"),
        (twice, "its entries are larger than it is"),
        (many_entries, r"it is not a zip file \(it has too many entries\)"),
        (in_the_former_form, "it is not a zip file"),
        (lambda data: data[:-30], "it is not a zip file"),
        (lambda data: b"PK\x03\x04", "it is not a zip file"),
        (lambda data: b"", "it is not a zip file"),
    ],
)
def test_a_tensor_needs_no_more_memory_than_it_has_bytes(tmp_path, change, said):
    torch.save(torch.zeros(300, 100), tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(b"before" + data + b"after")
    check_tensors(tmp_path, [("x", 6, len(data))])
    changed = change(data)
    (tmp_path / "x").write_bytes(b"before" + changed + b"after")
    with pytest.raises(DamagedError, match=f"x at byte 6: {said}"):
        check_tensors(tmp_path, [("x", 6, len(changed))])


def test_a_compressed_tensor_is_not_loaded(tmp_path):
    tensors = {"a": torch.zeros(300, 100)}
    dcp.save(held(tensors), tmp_path, None)
    (path,) = tmp_path.glob("*.distcp")
    path.write_bytes(compressed(path.read_bytes()))
    change_index(tmp_path, lambda index, tensor, chunk: chunk.update(length=path.stat().st_size))
    with pytest.raises(DamagedError, match="it is compressed"):
        dcp.load(held(tensors), tmp_path, None)


@pytest.mark.parametrize("what", ["dimensions", "chunks", "names", "fields"])
def test_a_pickled_index_takes_no_more_memory_than_it_has_bytes(tmp_path, what):
    """One object can be referred to many times, in two bytes each."""
    former(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3)})
    path = tmp_path / ".metadata"
    index = pickle.loads(path.read_bytes())
    entry = index.state_dict_metadata["a"]
    if what == "dimensions":
        entry.size = torch.Size([1] * 65)
    elif what == "chunks":
        entry.chunks = entry.chunks * 3
    elif what == "names":
        index.state_dict_metadata |= dict.fromkeys("cd", entry)
    else:
        vars(entry.chunks[0]).update({f"more{i}": 1 for i in range(65)})
    path.write_bytes(pickle.dumps(index, protocol=2))
    with pytest.raises(DamagedError, match="metadata cannot be used"):
        read_index(tmp_path, {p.name: {"size": p.stat().st_size} for p in tmp_path.iterdir()})
