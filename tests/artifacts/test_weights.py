"""Weights from artifacts of W&B: every kind, and what is refused in one sentence."""

import pytest
import torch
from safetensors.torch import save, save_file

from tests.support.lanes import slow
from tests.support.weights import some_tensors, write_checkpoint, write_shards
from train.artifacts import fetch
from train.artifacts.name import parse_name
from train.artifacts.weights import artifact_weights
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.mirror import Mirror
from train.checkpoint.store import CheckpointStore
from train.distributed.shard import Shard
from train.exits import DataError, RetryError, UsageError

real_client = pytest.mark.process
"""For tests with W&B's client, which start a process."""
NAME = "me/isorun/base:best"


def find(tmp_path, name=NAME):
    return artifact_weights(name, tmp_path / "download", "source is 'x'")


def refused(error, text, tmp_path, name=NAME):
    with pytest.raises(error) as refusal:
        find(tmp_path, name)
    assert text in str(refusal.value)
    assert str(refusal.value).startswith("source is 'x', ")
    assert "\n" not in str(refusal.value)


def files_in(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def checkpoint(tmp_path):
    """The files of an artifact with a checkpoint, and the checkpoint."""
    path = write_checkpoint(tmp_path / "run", some_tensors(), step=12)
    return {**files_in(path), "run/run.json": (tmp_path / "run/run.json").read_bytes()}, path


def add(artifacts, files):
    return artifacts.add("base", files, aliases=("latest", "best"))


def as_checkpoint(artifacts, tmp_path):
    add(artifacts, checkpoint(tmp_path)[0])


def _as_reference(artifacts, tmp_path, base):
    files, path = checkpoint(tmp_path)
    data = [name for name in files if name.startswith(("__", "index", "."))]
    references = {name: f"{base or path.parent.as_uri()}/{path.name}/{name}" for name in data}
    held = {name: value for name, value in files.items() if name not in data}
    artifact = add(artifacts, held)
    contents = artifact.manifest["contents"]
    contents |= {name: {"digest": "x", "ref": url, "size": 1} for name, url in references.items()}
    return artifact


def as_reference(artifacts, tmp_path):
    _as_reference(artifacts, tmp_path, None)


def as_reference_to_a_mirror(artifacts, tmp_path):
    base = f"file://{tmp_path}/mirror"
    _as_reference(artifacts, tmp_path, base)
    Mirror(MirrorConfig(url=base)).upload(
        CheckpointStore(tmp_path / "run/checkpoints"), 12, lambda: True
    )


def as_export(artifacts, tmp_path):
    add(artifacts, {"model.safetensors": save(some_tensors()), "config.json": b"{}", "sub/x": b""})


def as_shards(artifacts, tmp_path):
    names = list(some_tensors())
    parts = [{name: some_tensors()[name] for name in part} for part in (names[:2], names[2:])]
    add(artifacts, files_in(write_shards(tmp_path / "hf", *parts)))


def as_torch_file(artifacts, tmp_path):
    torch.save(some_tensors(), tmp_path / "w.pt")
    add(artifacts, {"w.pt": (tmp_path / "w.pt").read_bytes(), "notes.md": b"a"})


KINDS = [
    as_checkpoint, as_reference, as_reference_to_a_mirror, as_export, as_shards, as_torch_file,
]  # fmt: skip


def assert_is_found(make, tmp_path):
    source = find(tmp_path)
    assert source.artifact == "me/isorun/base:v0"
    assert source.is_visible()
    found = {
        n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in source.entries.items()
    }
    source.load({name: Shard.of(tensor) for name, tensor in found.items()}, None)
    assert found.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert torch.equal(found[name], tensor), name
    if make in KINDS[:3]:
        assert (source.step, source.run) == (12, "r")


@pytest.mark.parametrize("make", KINDS)
def test_each_kind_has_the_same_tensors(make, artifacts, tmp_path):
    make(artifacts, tmp_path)
    assert_is_found(make, tmp_path)


@pytest.mark.slow
@real_client
@pytest.mark.parametrize("make", [as_checkpoint, slow((as_shards,))])
def test_the_client_of_w_and_b_has_the_same_tensors(make, server, tmp_path):
    make(server.artifacts, tmp_path)
    assert_is_found(make, tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("wandb:team/vision/base:best", "team/vision/base:best"),
        ("wandb:vision/base", "mine/vision/base:latest"),
        ("wandb:base:v3", "mine/isorun/base:v3"),
        ("wandb:org/wandb-registry-model/base:prod", "org/wandb-registry-model/base:prod"),
        ("wandb:wandb-registry-model/base", "wandb-registry-model/base:latest"),
    ],
)
def test_a_name_is_completed_from_the_config(text, name, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert parse_name(text, "x", project="isorun", entity="mine") == name
    monkeypatch.setenv("WANDB_PROJECT", "other")  # as for the run itself
    assert parse_name("wandb:base", "x", project="isorun") == "other/base:latest"


@pytest.mark.parametrize(
    "text",
    ["wandb:", "wandb:a/b/c/d:e", "wandb:a//c:e", "wandb:a:", "wandb:a:b:c", "wandb:../b:e",
     "wandb://a/b", "wandb:a:b/c", "wandb:a\n:b"],
)  # fmt: skip
def test_a_malformed_name_is_refused(text):
    with pytest.raises(UsageError, match="write wandb:ENTITY/PROJECT/NAME:ALIAS"):
        parse_name(text, f"source is {text!r}", project="isorun")


@real_client
@pytest.mark.parametrize(
    ("name", "text"),
    [("me/isorun/none:best", "which W&B does not have"),
     ("me/isorun/base:none", "which W&B does not have"),
     ("me/isorun/data:best", "an artifact of the type 'dataset'; name one of the type 'model'")],
)  # fmt: skip
def test_what_w_and_b_does_not_have_is_refused(name, text, server, tmp_path):
    add(server.artifacts, {"w.pt": b"x"})
    server.artifacts.add("data", {"w.pt": b"x"}, type="dataset", aliases=("best",))
    refused(UsageError, text, tmp_path, name)


@real_client
@pytest.mark.parametrize(("key", "text"), [(None, "no valid credentials"), ("x", "API key")])
def test_missing_or_malformed_credentials(key, text, server, tmp_path, monkeypatch):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    else:
        monkeypatch.delenv("WANDB_API_KEY")
    refused(UsageError, text, tmp_path)


@real_client
@pytest.mark.parametrize(
    ("operation", "fault", "error", "text"),
    [
        slow(("Viewer", 500, RetryError, "cannot be reached")),
        ("Viewer", 401, UsageError, "no valid credentials"),
        ("ArtifactMembershipByName", 403, UsageError, "which W&B refuses"),
        slow(("artifact_download", "hang", RetryError, "W&B sent nothing for")),
        slow(("artifact_download", "cut", RetryError, "cannot be reached")),
        slow(("GetArtifactMembershipFileUrls", "close", RetryError, "W&B")),
    ],
)
def test_a_server_that_fails(operation, fault, error, text, server, tmp_path, monkeypatch):
    if fault == "hang":
        monkeypatch.setattr(fetch, "SILENCE", 6.0)
    add(server.artifacts, {"w.pt": b"x" * 2000})
    server.fault = lambda asked: fault if asked == operation else None
    refused(error, text, tmp_path)


@pytest.mark.slow
@real_client
def test_a_server_that_is_not_there(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    refused(RetryError, "cannot be reached", tmp_path)


@pytest.mark.slow
@real_client
def test_a_lost_connection_is_tried_again(server, tmp_path):
    as_export(server.artifacts, tmp_path)
    faults = iter([None, "cut", "cut"])
    server.fault = lambda op: next(faults, None) if op == "artifact_download" else None
    assert find(tmp_path).entries


def damaged(artifacts, artifact, name):
    artifacts.damage(artifact, name)


def larger(artifacts, artifact, name):
    artifacts.damage(artifact, name, b"x" * (3 << 20))


def lost(artifacts, artifact, name):
    del artifact.files[name]


@pytest.mark.slow
@real_client
@pytest.mark.parametrize("damage", [slow((damaged,)), slow((larger,)), lost])
def test_a_file_that_w_and_b_has_not_as_it_was_logged(damage, server, tmp_path):
    artifact = add(server.artifacts, checkpoint(tmp_path)[0])
    damage(server.artifacts, artifact, "__0_0.distcp")
    refused(DataError, "which is damaged", tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", [damaged, larger])
def test_files_that_were_logged_with_damage(damage, name, artifacts, tmp_path):
    """Only our own hashes tell."""
    artifact = add(artifacts, checkpoint(tmp_path)[0])
    damage(artifacts, artifact, name)
    artifacts.rehash(artifact)
    refused(DataError, "which is damaged", tmp_path)


@pytest.mark.parametrize(
    "name", ["../w.pt", "/tmp/w.pt", "a/../../w.pt", "run\\w.pt", "a\x1b[2Jb", "./w.pt", "a//b"]
)
def test_names_of_strangers_choose_no_path(name, artifacts, tmp_path):
    artifact = add(artifacts, {"w.pt": b"x"})
    contents = artifact.manifest["contents"]
    contents[name] = contents["w.pt"]
    with pytest.raises(DataError, match="outside of its directory") as refusal:
        find(tmp_path)
    assert "\x1b" not in str(refusal.value)
    assert not list((tmp_path / "download").rglob("*.pt"))


@pytest.mark.parametrize(
    ("files", "text"),
    [({"notes.md": b"x"}, "which has no file of weights at its root"),
     ({"sub/w.pt": b"x"}, "which has no file of weights at its root"),
     ({"a.pt": b"x", "b.pt": b"y"}, "which has several files of weights (a.pt, b.pt)")],
)  # fmt: skip
def test_an_artifact_without_weights(files, text, artifacts, tmp_path):
    add(artifacts, files)
    refused(UsageError, text, tmp_path)


def test_a_foreign_file_in_a_checkpoint(artifacts, tmp_path):
    add(artifacts, {**checkpoint(tmp_path)[0], "run/evil.py": b"x"})
    refused(DataError, "which has 'run/evil.py', no file of a checkpoint", tmp_path)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "http://127.0.0.1:1/step-000000000012/x", "s3://bucket/x",
     "file:///a/../step-000000000012/x", "file:///a/%2e%2e/step-000000000012/x",
     "github://a:b@c/step-000000000012/x", "file://x::s3://y/step-000000000012/../z"],
)  # fmt: skip
def test_references_to_anywhere_are_not_followed(url, artifacts, tmp_path):
    artifact = _as_reference(artifacts, tmp_path, None)
    artifact.manifest["contents"]["__0_0.distcp"]["ref"] = url
    refused(UsageError, "which is not followed", tmp_path)


def test_a_reference_to_weights_of_another_kind_is_not_followed(artifacts, tmp_path):
    artifact = add(artifacts, {})
    save_file(some_tensors(), tmp_path / "model.safetensors")
    entry = {"digest": "x", "ref": (tmp_path / "model.safetensors").as_uri(), "size": 1}
    artifact.manifest["contents"]["model.safetensors"] = entry
    refused(UsageError, "whose model.safetensors is only a reference", tmp_path)


def changed(path):
    (path / "__0_0.distcp").write_bytes(b"x" * (path / "__0_0.distcp").stat().st_size)


def linked(path):
    (path / "__0_0.distcp").rename(path / "data")
    (path / "__0_0.distcp").symlink_to("data")


def longer(path):
    with (path / "__0_0.distcp").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [(changed, DataError, "does not match its SHA-256"),
     (longer, DataError, "does not have the size"),
     (linked, DataError, "cannot be used"),
     (lambda path: (path / "__0_0.distcp").unlink(), UsageError, "it is no longer at"),
     (lambda path: path.rename(path.parent / "gone"), UsageError, "it is no longer at")],
)  # fmt: skip
def test_what_a_reference_leads_to_must_be_what_was_logged(
    change, error, text, artifacts, tmp_path
):
    as_reference(artifacts, tmp_path)
    change(tmp_path / "run/checkpoints/step-000000000012")
    refused(error, text, tmp_path)
