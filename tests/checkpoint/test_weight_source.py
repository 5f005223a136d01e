"""Sources of initial weights: every kind, and what is refused."""

import io
import json
import os
import socket
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hostile import Evil
from tests.support.weights import some_tensors, write_checkpoint, write_shards
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.mirror import Mirror
from train.checkpoint.store import CheckpointStore
from train.checkpoint.weight_source import find_source, remove_download
from train.distributed.shard import Shard
from train.exits import DataError, RetryError, UsageError


def find(source, tmp_path, start=None):
    return find_source(
        str(source), start or tmp_path, tmp_path / "download", f"source is {source!r}"
    )


def refused(error, text, source, tmp_path):
    with pytest.raises(error) as refusal:
        find(source, tmp_path)
    assert text in str(refusal.value)
    assert str(refusal.value).startswith(f"source is {source!r}")


def read(source):
    """All tensors of a source, by name."""
    found = {
        n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in source.entries.items()
    }
    source.load({name: Shard.of(tensor) for name, tensor in found.items()}, None)
    return found


def as_run(tmp_path):
    write_checkpoint(tmp_path / "run", some_tensors(1), step=3)
    write_checkpoint(tmp_path / "run", some_tensors(), step=12)
    return "run"


def as_checkpoint(tmp_path):
    as_run(tmp_path)
    return "run/checkpoints/step-000000000012"


def as_export(tmp_path):
    (tmp_path / "export").mkdir()
    save_file(some_tensors(), tmp_path / "export/model.safetensors")
    return tmp_path / "export"


def as_file(tmp_path):
    save_file(some_tensors(), tmp_path / "weights.safetensors")
    return "weights.safetensors"


def as_shards(tmp_path):
    names = list(some_tensors())
    parts = [{name: some_tensors()[name] for name in part} for part in (names[:2], names[2:])]
    return write_shards(tmp_path / "hf", *parts)


def as_index(tmp_path):
    return as_shards(tmp_path) / "model.safetensors.index.json"


def as_torch(tmp_path):
    torch.save({**some_tensors(), "layer._extra_state": {"any": "value"}}, tmp_path / "w.pt")
    return "w.pt"


def as_links(tmp_path):
    """As the cache of Hugging Face."""
    as_file(tmp_path)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../weights.safetensors")
    return "snapshot"


def as_mirror(tmp_path):
    as_run(tmp_path)
    url = f"file://{tmp_path}/mirror"
    for step in (3, 12):
        store = CheckpointStore(tmp_path / "run/checkpoints")
        Mirror(MirrorConfig(url=url)).upload(store, step, lambda: True)
    return url


KINDS = [as_run, as_checkpoint, as_export, as_file, as_shards, as_index, as_torch, as_links]


@pytest.mark.parametrize("make", [*KINDS, as_mirror])
def test_each_kind_has_the_same_tensors(make, tmp_path):
    source = find(make(tmp_path), tmp_path)
    assert source.is_visible()
    found = read(source)
    assert found.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert len(source.sha256) == 64


def test_a_run_stands_for_its_newest_checkpoint_and_a_checkpoint_for_itself(tmp_path):
    as_run(tmp_path)
    assert (find("run", tmp_path).step, find("run", tmp_path).run) == (12, "r")
    older = find("run/checkpoints/step-000000000003", tmp_path)
    assert older.step == 3
    assert torch.equal(read(older)["scale"], some_tensors(1)["scale"])
    assert older.sha256 != find("run", tmp_path).sha256


def test_a_mirror_stands_for_its_newest_copy_and_a_url_of_a_step_for_that(tmp_path):
    url = as_mirror(tmp_path)
    assert find(url, tmp_path).step == 12
    remove_download(tmp_path / "download")
    assert find(f"{url}/step-000000000003/", tmp_path).step == 3
    remove_download(tmp_path / "download")
    assert not (tmp_path / "download").exists()
    refused(UsageError, "no checkpoint of step 4", f"{url}/step-000000000004", tmp_path)


@pytest.mark.normal
def test_a_mirror_in_an_object_store(tmp_path, bucket, monkeypatch):
    bucket_url, options = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])  # a source has no options
    as_run(tmp_path)
    url, store = f"{bucket_url}/weights", CheckpointStore(tmp_path / "run/checkpoints")
    Mirror(MirrorConfig(url=url, options=options)).upload(store, 12, lambda: True)
    refused(UsageError, "no checkpoint of step 3", f"{url}/step-000000000003", tmp_path)
    found = find(url, tmp_path)
    assert found.step == 12
    assert torch.equal(read(found)["scale"], some_tensors()["scale"])
    remove_download(tmp_path / "download")
    refused(UsageError, "mirror with no checkpoint", "s3://no-such-bucket/weights", tmp_path)


def test_a_later_evaluation_of_the_step_is_no_change(tmp_path):
    as_run(tmp_path)
    before = find("run", tmp_path)
    CheckpointStore(tmp_path / "run/checkpoints").amend(12, {}, {"loss": 1.0})
    assert find("run", tmp_path).sha256 == before.sha256


def test_only_the_parts_of_a_rank_are_read(tmp_path):
    for make in (as_file, as_torch, as_checkpoint):
        source = find(make(tmp_path), tmp_path)
        chunk = Shard(torch.Size((4, 3)), torch.empty(2, 3), offsets=(1, 0))
        flat = Shard(torch.Size((4, 3)), torch.empty(5), start=4)
        for shard in (chunk, flat):
            source.load({"layer.weight": shard}, None)
        full = some_tensors()["layer.weight"]
        assert torch.equal(chunk.local, full[1:3])
        assert torch.equal(flat.local, full.flatten()[4:9])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere", "no such file or directory; name a run directory"),
        ("empty", "a directory without a checkpoint"),
        ("empty-run", "a run directory without a committed checkpoint"),
        ("notes.txt", "a file of an unknown kind"),
        ("copy", "the name of a committed checkpoint is step-<12 digits>"),
        ("fifo.safetensors", "it is a FIFO, not a regular file"),
        ("~nobody-of-this-name/x", "write the path without ~"),
        ("nothing://here/x", "which cannot be used"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(source, text, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty-run").mkdir()
    (tmp_path / "empty-run/run.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    write_checkpoint(tmp_path / "run", some_tensors()).rename(tmp_path / "copy")
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(UsageError) as refusal:
        find(source, tmp_path)
    assert text in str(refusal.value)
    assert repr(source) in str(refusal.value)


def test_an_empty_or_unreachable_mirror(tmp_path, monkeypatch):
    refused(UsageError, "is a mirror with no checkpoint", f"file://{tmp_path}/none", tmp_path)
    url = as_mirror(tmp_path)
    monkeypatch.setattr("train.checkpoint.mirror_storage.FolderStorage.folders", broken)
    refused(RetryError, "Input/output error", url, tmp_path)


@pytest.mark.parametrize("source", ["s3://", "s3:///", "file://", "://"])
def test_a_url_that_names_no_folder_is_refused(tmp_path, source):
    refused(UsageError, "which names no folder", source, tmp_path)


def test_storage_that_cannot_be_connected_to_is_worth_a_retry(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nothing listens there
        url = f"ftp://127.0.0.1:{free.getsockname()[1]}/folder"
        with pytest.raises(RetryError, match=f"{url}', which cannot be reached"):
            find(url, tmp_path)


def broken(*_):
    raise OSError(5, "Input/output error")


def test_storage_that_fails_is_worth_a_retry(tmp_path, monkeypatch):
    as_file(tmp_path)
    monkeypatch.setattr("train.checkpoint.weight_source.hash_file", broken)
    refused(RetryError, "Input/output error", "weights.safetensors", tmp_path)


def test_a_damaged_checkpoint_is_refused_and_stays_where_it_is(tmp_path):
    newest = tmp_path / as_checkpoint(tmp_path)
    with (newest / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    refused(DataError, "step-000000000012 is damaged", "run", tmp_path)
    assert newest.exists()
    assert find("run/checkpoints/step-000000000003", tmp_path).step == 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    write_checkpoint(tmp_path / "run", some_tensors(), run="another")
    refused(DataError, "has run 'another'", "run", tmp_path)


def test_a_damaged_copy_is_refused(tmp_path):
    url = as_mirror(tmp_path)
    [part] = (tmp_path / "mirror/step-000000000012").glob("__0_0*")
    part.write_bytes(b"x" * part.stat().st_size)
    refused(DataError, "is missing or damaged", url, tmp_path)


def compressed(path):
    stored = io.BytesIO()
    torch.save(some_tensors(), stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


FILES = {
    "header.safetensors": (lambda path: path.write_bytes(b"\xff" * 64), "cannot be read"),
    "short.safetensors": (
        lambda path: (save_file(some_tensors(), path), os.truncate(path, path.stat().st_size - 4)),
        "cannot be read",
    ),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "cannot be read"),
    "none.safetensors": (lambda path: save_file({}, path), "has no tensors"),
    "text.pt": (lambda path: path.write_text("x" * 99), "it is not a zip file"),
    "compressed.pt": (compressed, "it is compressed"),
    "nested.pt": (
        lambda path: torch.save({"model": some_tensors(), "step": 3}, path),
        "'model' is a dict; save the state_dict of the model alone",
    ),
    "list.bin": (lambda path: torch.save([torch.ones(1)], path), "has a list, not a state_dict"),
    "meta.pth": (
        lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "is not a state_dict",
    ),
    "sparse.pt": (
        lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "is not a state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_unusual_file_is_refused(name, tmp_path):
    write, text = FILES[name]
    write(tmp_path / name)
    refused(DataError, text, name, tmp_path)


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"a": torch.ones(2), "b": Evil(tmp_path / "created")}, tmp_path / "evil.pt")
    refused(DataError, "does not read with weights_only=True", "evil.pt", tmp_path)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a": "../weights.safetensors"}, "has 'a' in '../weights.safetensors'"),
        ({"a": "model-00003-of-00002.safetensors"}, "No such file"),
        ({"a": "model-00001-of-00002.safetensors"}, "has a, which model-00001"),
        ({"a": 5}, "has 'a' in 5"),
    ],
)
def test_an_index_names_only_what_is_in_its_directory(change, text, tmp_path):
    as_file(tmp_path)
    index = as_index(tmp_path)
    values = json.loads(index.read_text())
    values["weight_map"] |= change
    index.write_text(json.dumps(values))
    with pytest.raises((DataError, UsageError)) as refusal:
        find("hf", tmp_path)
    assert text in str(refusal.value)


def test_an_index_that_is_no_index_is_refused(tmp_path):
    as_index(tmp_path).write_text('{"weight_map": []}')
    refused(DataError, "its weight_map is a list", "hf", tmp_path)
