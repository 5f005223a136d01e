"""The checkpoint store: transactions, damage and retention."""

import errno
import os

import pytest

from train.checkpoint.checkpoint_config import BestConfig, CheckpointConfig
from train.checkpoint.store import MANIFEST, CheckpointStore, DamagedError, Manifest, hash_file


def commit(store, step, metrics=None, data=b"tensors" * 1000):
    temporary = store.begin(step)
    (temporary / "__0_0.distcp").write_bytes(data)
    (temporary / ".metadata").write_bytes(b"meta")
    files = {name: hash_file(temporary / name) for name in ("__0_0.distcp", ".metadata")}
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


@pytest.mark.parametrize(
    ("damage", "name", "expected"),
    [
        (truncate, "__0_0.distcp", "has 6999 bytes instead of 7000"),
        (flip_a_bit, "__0_0.distcp", "does not match its SHA-256"),
        (os.remove, "__0_0.distcp", "cannot be read"),
        (os.remove, ".metadata", "cannot be read"),
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
