"""The checkpoint store: transactions, damage and retention."""

import errno
import os

import pytest

from tests.support.hostile import rewrite_hashed
from train.checkpoint.checkpoint_config import BestConfig, CheckpointConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.index import to_json
from train.checkpoint.manifest import MANIFEST, Manifest, hash_file
from train.checkpoint.store import CheckpointStore
from train.exits import ResumeRefusedError


def commit(store, step, metrics=None, data=b"tensors" * 1000):
    temporary = store.begin(step)
    (temporary / "__0_0.distcp").write_bytes(data)
    (temporary / "index.json").write_text(to_json({}))
    files = {name: hash_file(temporary / name) for name in ("__0_0.distcp", "index.json")}
    return store.commit(temporary, Manifest(step, {"x": 1}, metrics, files))


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def test_a_checkpoint_is_not_listed_before_its_commit(store):
    temporary = store.begin(5)
    (temporary / "__0_0.distcp").write_bytes(b"half")
    assert store.steps() == []
    assert store.remove_incomplete() == [temporary.name]
    assert list(store.directory.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o2775, 0o700])
def test_only_the_owner_can_put_files_into_an_uncommitted_checkpoint(store, mode):
    store.directory.mkdir()
    store.directory.chmod(mode)
    temporary = store.begin(10)
    assert temporary.stat().st_mode & 0o777 == 0o700
    (temporary / "x").write_bytes(b"")
    committed = store.commit(temporary, Manifest(10, {}, None, {"x": hash_file(temporary / "x")}))
    assert committed.stat().st_mode & 0o7777 == mode


def test_a_commit_is_read_back(store):
    commit(store, 10, {"loss": 0.5})
    assert store.steps() == [10]
    assert store.problems(10) == []
    manifest = Manifest.read(store.path(10))
    assert (manifest.step, manifest.state, manifest.metrics) == (10, {"x": 1}, {"loss": 0.5})


def test_a_failing_commit_leaves_no_checkpoint(store, monkeypatch):
    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        commit(store, 10)
    monkeypatch.undo()
    assert store.steps() == []


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def as_link(path):
    """The same content, but elsewhere."""
    elsewhere = path.parents[1] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def as_fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "name", "expected"),
    [
        (truncate, "__0_0.distcp", "has 6999 bytes instead of 7000"),
        (flip_a_bit, "__0_0.distcp", "does not match its SHA-256"),
        (os.remove, "__0_0.distcp", "cannot be read"),
        (os.remove, "index.json", "cannot be read"),
        (as_link, "__0_0.distcp", "it is a symbolic link"),
        (as_fifo, "__0_0.distcp", "it is a FIFO"),
        (as_link, MANIFEST, "it is a symbolic link"),
        (as_link, "", "it is a symbolic link"),
        (truncate, MANIFEST, MANIFEST),
        (flip_a_bit, MANIFEST, MANIFEST),
        (os.remove, MANIFEST, "is missing"),
    ],
)
def test_damage_is_detected_and_named(store, damage, name, expected):
    path = commit(store, 10)
    damage(path / name)
    (problem,) = store.problems(10)
    assert name in problem
    assert expected in problem


@pytest.mark.parametrize("name", ["__1_0.distcp", "x.distcp", ".metadata"])
def test_data_that_the_manifest_does_not_name_is_refused(store, name):
    path = commit(store, 10)
    (path / name).write_bytes(b"planted")
    assert store.problems(10) == [f"{path / name} is not in {path / MANIFEST}"]
    (path / name).unlink()
    (path / ".DS_Store").touch()  # of a file manager
    assert store.problems(10) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].update({"../../../x": body["files"]["__0_0.distcp"]}),
        lambda body: body["files"].update({"/x": body["files"]["__0_0.distcp"]}),
        lambda body: body["files"].update({"": body["files"]["__0_0.distcp"]}),
        lambda body: body["files"].update({"a\nb": body["files"]["__0_0.distcp"]}),
        lambda body: body["files"].update({"x" * 256: body["files"]["__0_0.distcp"]}),
        lambda body: body["files"].update({"x": None}),
        lambda body: body["files"]["__0_0.distcp"].update(size="7000"),
        lambda body: body["files"]["__0_0.distcp"].update(size=-1),
        lambda body: body["files"]["__0_0.distcp"].update(sha256="../x"),
        lambda body: body.update(step=True),
        lambda body: body.update(step=10**30),
        lambda body: body.update(state=[]),
        lambda body: body.update(metrics={"loss": "low"}),
        lambda body: body.update(metrics={"loss": 10**400}),
        lambda body: body.update(metrics={"loss": -(10**309)}),
        lambda body: body.update(metrics={"loss": True}),
        lambda body: body.update(metrics=3),
        lambda body: body.update(more=1),
        lambda body: body.pop("files"),
        lambda body: body["files"].pop("index.json"),
    ],
)
def test_a_manifest_of_another_form_is_damage(store, change):
    path = commit(store, 10, {"loss": 0.5})
    rewrite_hashed(path / MANIFEST, change)
    assert store.problems(10)


@pytest.mark.parametrize("text", ["[" * 100_000, '"x"', "1", "null", '{"sha256": 1}', "\xff\xfe"])
def test_a_manifest_that_is_no_object_is_damage(store, text):
    path = commit(store, 10)
    (path / MANIFEST).write_text(text, encoding="latin-1")
    assert "cannot be read" in store.problems(10)[0]


def test_a_manifest_is_not_read_if_it_is_too_large(store):
    path = commit(store, 10) / MANIFEST
    os.truncate(path, 5 << 30)  # a sparse file
    assert "has 5,368,709,120 bytes, more than" in store.problems(10)[0]


def test_a_linked_directory_of_checkpoints_is_refused(store, tmp_path):
    commit(store, 10)
    store.directory.rename(tmp_path / "elsewhere")
    store.directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResumeRefusedError, match="it is a symbolic link"):
        store.steps()


def test_a_changed_number_in_the_manifest_is_damage(store):
    path = commit(store, 10, {"loss": 0.5}) / MANIFEST
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert "does not match its own SHA-256" in store.problems(10)[0]


def test_a_quarantined_checkpoint_is_not_listed(store):
    commit(store, 10)
    commit(store, 20)
    aside = store.quarantine(20)
    assert store.steps() == [10]
    assert aside.name.startswith("damaged-step-000000000020")
    commit(store, 20)  # the step can be saved again
    assert store.steps() == [10, 20]


def test_retention(store):
    for step, loss in ((10, 0.9), (20, 0.2), (30, 0.5), (40, float("nan")), (50, 0.4), (60, None)):
        commit(store, step, None if loss is None else {"loss": loss})
    config = CheckpointConfig(
        keep_last=1, keep_every_steps=30, keep_best=BestConfig(metric="loss", keep=2)
    )
    assert store.prune(config) == [10, 40]
    assert store.steps() == [20, 30, 50, 60]
    assert store.best("loss", "min") == [20, 50, 30]
    assert store.best("loss", "max") == [30, 50, 20]


def test_the_newest_is_always_kept(store):
    for step in (10, 20, 30):
        commit(store, step)
    store.prune(CheckpointConfig(keep_last=1))
    assert store.steps() == [30]


def test_a_storage_error_is_not_damage(store, monkeypatch):
    """A file that cannot be read now may be valid, so the checkpoint must not be quarantined."""
    commit(store, 1)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("train.checkpoint.store.hash_file", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        store.newest_valid()
    assert store.steps() == [1]


def test_an_evaluation_can_be_added_later(store):
    commit(store, 1)
    store.amend(1, {"n": 5}, {"loss": 2.0})
    assert store.problems(1) == []
    assert store.metrics() == {1: {"loss": 2.0}}
    assert store.best("loss", "min") == [1]
    assert store.best("loss", "max") == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_metric_is_never_best(store, value):
    commit(store, 1)
    commit(store, 2)
    store.amend(1, {}, {"loss": value})
    store.amend(2, {}, {"loss": 3.0})
    assert store.best("loss", "min") == store.best("loss", "max") == [2]


def test_a_checkpoint_whose_content_is_refused_is_set_aside(store):
    """Its files are those of the manifest, but the metadata is no metadata of DCP."""
    commit(store, 1)
    commit(store, 2)

    def check(path):
        if path == store.path(2):
            raise DamagedError("the metadata is not safe to load")

    step, notes = store.newest_valid(check)
    assert step == 1
    assert "step 2 is damaged (the metadata is not safe to load)" in notes[0]
    assert store.steps() == [1]


def test_a_deeply_nested_manifest_is_damage(store):
    commit(store, 1)
    (store.path(1) / MANIFEST).write_text("[" * 100_000)
    assert "cannot be read" in store.problems(1)[0]


def test_only_ascii_digits_name_a_step(store):
    commit(store, 10)
    for digits in ("\u0660" * 10 + "\u0669" * 2, "\uff10" * 11 + "1", "\u00b2" * 12):
        (store.directory / f"step-{digits}").mkdir()
    assert store.steps() == [10]
