"""The mirror: upload, interruption, damage and restore."""

import json
import os
import queue
import shutil
import time

import fsspec
import pytest

from tests.support.hostile import rewrite_hashed
from tests.support.lanes import slow
from train.checkpoint.checkpoint_config import CheckpointConfig, MirrorConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.index import to_json
from train.checkpoint.layout import step_name
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.mirror_storage import UrlStorage
from train.checkpoint.mirroring import Mirroring, restore_from_mirror
from train.checkpoint.store import CheckpointStore
from train.exits import ResumeRefusedError, RetryError, UsageError

LARGE = 5 * 2**20 + 3  # bytes: six parts of 1 MiB


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.normal)])
def config(request, tmp_path):
    if request.param == "file":
        return MirrorConfig(url=f"file://{tmp_path}/mirror", part_mb=1)
    url, options = request.getfixturevalue("bucket")
    return MirrorConfig(url=f"{url}/{tmp_path.name}", options=options, part_mb=1)


def make(store, step, **state):
    store.directory.parent.mkdir(exist_ok=True)
    temporary = store.begin(step)
    (temporary / "__0_0.distcp").write_bytes(bytes([step]) * LARGE)
    (temporary / "index.json").write_text(to_json({}))
    files = {p.name: hash_file(p) for p in temporary.iterdir()}
    store.commit(temporary, Manifest(step, {"position": step, **state}, None, files))


@pytest.fixture
def store(tmp_path):
    made = CheckpointStore(tmp_path / "run/checkpoints")
    make(made, 10)
    (tmp_path / "run/run.json").write_text('{"id": "mine"}')
    (tmp_path / "run/ledger.bin").write_bytes(b"ledger")
    return made


def elsewhere(tmp_path):
    (tmp_path / "other").mkdir(exist_ok=True)
    return CheckpointStore(tmp_path / "other/checkpoints")


def always():
    return True


def storage_of(config):
    """The class of storage through which every mirror of this config reads and writes."""
    return type(Mirror(config).storage)


@pytest.mark.slow
def test_copies_of_other_processes_are_seen(config, store):
    mirror = Mirror(config)
    mirror.upload(store, 10, always)
    assert mirror.steps() == [10]
    other, root = fsspec.core.url_to_fs(config.url, skip_instance_cache=True, **config.options)
    other.cp(f"{root}/{step_name(10)}", f"{root}/{step_name(20)}", recursive=True)
    assert mirror.steps() == Mirror(config).steps() == [10, 20]


def test_upload_and_restore(config, store, tmp_path):
    mirror = Mirror(config)
    assert mirror.steps() == []
    mirror.upload(store, 10, always)
    assert mirror.steps() == [10]
    other = elsewhere(tmp_path)
    step, notes = restore_from_mirror(Mirror(config), other)
    assert step == 10
    assert notes == [f"Restored the checkpoint of step 10 from {config.url}."]
    assert other.problems(10) == []
    assert {p.name: hash_file(p) for p in other.path(10).iterdir()} == {
        p.name: hash_file(p) for p in store.path(10).iterdir()
    }
    assert (tmp_path / "other/ledger.bin").read_bytes() == b"ledger"
    assert json.loads((tmp_path / "other/run.json").read_text())["id"] == "mine"


def test_an_interrupted_upload_sends_no_part_twice(config, store, monkeypatch):
    storage, sent = storage_of(config), []
    put = storage.write

    def interrupted(self, path, data):
        if len(sent) == 3:
            raise OSError("the cable is cut")
        sent.append(path)
        put(self, path, data)

    monkeypatch.setattr(storage, "write", interrupted)
    with pytest.raises(MirrorError, match="cable"):
        Mirror(config).upload(store, 10, always)
    assert Mirror(config).steps() == []
    monkeypatch.setattr(
        storage, "write", lambda self, path, data: sent.append(path) or put(self, path, data)
    )
    Mirror(config).upload(store, 10, always)
    assert len(sent) == len(set(sent)) == 6 + 1 + 1 + 2 + 1  # data, metadata, manifest, run, index
    assert Mirror(config).steps() == [10]


def test_a_part_that_differs_when_read_back_is_not_committed(config, store, monkeypatch):
    storage = storage_of(config)
    put = storage.write
    monkeypatch.setattr(
        storage,
        "write",
        lambda self, path, data: put(self, path, data.replace(b"\x0a\x0a", b"\x0b\x0a", 1)),
    )
    with pytest.raises(MirrorError, match="differs when read back"):
        Mirror(config).upload(store, 10, always)
    assert Mirror(config).steps() == []


@pytest.mark.parametrize("damage", ["a part", slow("a part is gone"), slow("the index")])
def test_a_damaged_copy_is_reported_and_an_older_one_is_restored(config, store, tmp_path, damage):
    make(store, 20)
    mirror = Mirror(config)
    mirror.upload(store, 10, always)
    mirror.upload(store, 20, always)
    storage, root = fsspec.url_to_fs(config.url, use_listings_cache=False, **config.options)
    name = "mirror.json" if damage == "the index" else "__0_0.distcp.00002*"
    (path,) = storage.glob(f"{root}/step-000000000020/{name}")
    if damage == "a part is gone":
        storage.rm_file(path)
    else:
        data = storage.cat_file(path)
        storage.pipe_file(
            path, data[:100].replace(b'"step": 20', b'"step": 30') + b"?" + data[101:]
        )
    step, notes = restore_from_mirror(Mirror(config), other := elsewhere(tmp_path))
    assert step == 10
    assert "The mirror's checkpoint of step 20 is damaged" in notes[0]
    assert other.steps() == [10]
    assert [p.name for p in other.directory.iterdir()] == ["step-000000000010"]


def test_a_url_belongs_to_one_run(config, store):
    mirror = Mirror(config)
    mirror.claim("mine")
    mirror.claim("other")  # nothing there could be lost
    mirror.upload(store, 10, always)
    Mirror(config).claim("other")
    with pytest.raises(ResumeRefusedError, match=r"holds the checkpoints of the run\s+other"):
        Mirror(config).claim("mine")


@pytest.mark.slow
def test_the_thread_follows_the_run_directory(config, store):
    """The mirror holds the same checkpoints as the run directory."""
    warnings = []
    make(store, 20)
    mirroring = Mirroring(Mirror(config), store, "mine", warnings.append)
    mirroring.close(60)
    assert Mirror(config).steps() == [10, 20]
    mirroring = Mirroring(Mirror(config), store, "mine", warnings.append)
    make(store, 30)
    store.prune(CheckpointConfig(keep_last=1))
    mirroring.committed()
    mirroring.close(60)
    assert Mirror(config).steps() == [30]
    assert warnings == []


def test_a_checkpoint_is_not_removed_during_its_upload(config, store, monkeypatch):
    upload = Mirror.upload

    def meanwhile(self, store_, step, going):
        if step == 10:
            make(store, 20)
            store.prune(CheckpointConfig(keep_last=1))
            assert store.steps() == [10, 20]
        upload(self, store_, step, going)

    monkeypatch.setattr(Mirror, "upload", meanwhile)
    mirroring = Mirroring(Mirror(config), store, "mine", print)
    mirroring.close(60)
    assert Mirror(config).steps() == [10, 20]
    assert store.prune(CheckpointConfig(keep_last=1)) == [10]


def test_the_mirror_of_another_run_is_not_changed(config, store):
    mirror, warnings = Mirror(config), []
    mirror.claim("other")
    Mirroring(mirror, store, "mine", warnings.append).close(1)
    assert "the run other owns it now" in warnings[0]
    assert mirror.steps() == []


def test_a_storage_error_is_reported_once_and_retried(config, store, monkeypatch):
    from train.checkpoint import mirroring as module

    storage, calls, warnings = storage_of(config), [], []
    put = storage.write

    def failing(self, path, data):
        calls.append(path)
        if len(calls) < 3:
            raise OSError("503")
        put(self, path, data)

    monkeypatch.setattr(storage, "write", failing)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.05)
    mirroring = Mirroring(Mirror(config), store, "mine", warnings.append)
    end = time.monotonic() + 60
    while not Mirror(config).steps() and time.monotonic() < end:
        time.sleep(0.05)
    assert Mirror(config).steps() == [10]
    mirroring.close(60)
    assert warnings == [
        f"Checkpoints cannot be copied to {config.url} (OSError: 503); training continues, and the upload is retried."
    ]


def test_the_end_of_the_run_waits_only_for_the_timeout(config, store, monkeypatch):
    monkeypatch.setattr(Mirror, "steps", lambda self: (_ for _ in ()).throw(MirrorError("down")))
    warnings = []
    Mirroring(Mirror(config), store, "mine", warnings.append).close(0.5)
    assert "Not all checkpoints are in" in warnings[-1]


def test_an_interrupted_end_abandons_the_upload(tmp_path, store, monkeypatch):
    going = queue.Queue()
    monkeypatch.setattr(Mirror, "upload", lambda self, store_, step, is_going: going.put(is_going))
    mirroring = Mirroring(Mirror(MirrorConfig(url=f"file://{tmp_path}/m")), store, "mine", print)

    def interrupted():
        raise KeyboardInterrupt

    is_going = going.get(timeout=60)
    assert is_going()
    monkeypatch.setattr(mirroring._thread, "is_alive", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        mirroring.close(60, beat=interrupted)
    assert not is_going()


def test_an_unreadable_mirror_is_not_an_empty_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }
    mirror = Mirror(MirrorConfig(url="s3://bucket/run", options=options))
    with pytest.raises(RetryError, match="cannot be read"):
        restore_from_mirror(mirror, elsewhere(tmp_path))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"url": "nosuch://x"}, "cannot be used"),
     ({"url": "s3://x", "options": {"secret": "abc"}}, "set secrets in the environment"),
     ({"url": "s3://x", "options": {"aws_session_token": "abc"}}, "set secrets in the env")],
)  # fmt: skip
def test_bad_input(values, said):
    with pytest.raises((UsageError, ValueError), match=said):
        Mirror(MirrorConfig(**values))


def test_a_checkpoint_with_a_damaged_manifest_is_not_uploaded(config, store):
    (store.path(10) / "manifest.json").write_text("{}")
    with pytest.raises(DamagedError):
        Mirror(config).upload(store, 10, always)


@pytest.fixture
def local(tmp_path):
    return MirrorConfig(url=f"file://{tmp_path}/mirror", part_mb=1)


def test_the_checkpoint_of_another_run_is_not_uploaded(local, store):
    make(store, 20, run="other")
    with pytest.raises(DamagedError, match="is of the run other, not of the run mine"):
        Mirror(local).upload(store, 20, always)
    assert Mirror(local).steps() == []


def test_the_copy_of_another_run_or_step_is_not_restored(local, store, tmp_path):
    make(store, 20, run="mine")
    mirror = Mirror(local)
    for step in (10, 20):
        mirror.upload(store, step, always)
    copies = tmp_path / "mirror"
    other = elsewhere(tmp_path)
    (other.directory.parent / "run.json").write_text('{"id": "other"}')
    assert restore_from_mirror(mirror, other)[0] == 10, "the older one does not say of which run"
    shutil.copytree(copies / "step-000000000010", copies / "step-000000000030")
    fresh = CheckpointStore(tmp_path / "fresh/checkpoints")
    fresh.directory.parent.mkdir()
    step, notes = restore_from_mirror(mirror, fresh)
    assert step == 20
    assert "is of step 10, not of step 30" in notes[0]
    assert fresh.steps() == [20]


def rewrite_index(mirror_path, change, step=10):
    """Changes the index of a copy together with its hash."""
    rewrite_hashed(mirror_path / f"step-{step:012d}/mirror.json", change)


def test_a_copy_cannot_choose_a_path(local, store, tmp_path):
    """The names of its files come from the storage."""
    mirror = Mirror(local)
    mirror.upload(store, 10, always)

    def plant(index):
        index["files"]["run/../../../planted"] = index["files"].pop("index.json")

    rewrite_index(tmp_path / "mirror", plant)
    other = elsewhere(tmp_path)
    step, notes = restore_from_mirror(mirror, other)
    assert step is None
    assert "planted" in notes[0]
    assert not list(tmp_path.rglob("planted"))


def test_nothing_is_removed_from_the_mirror_of_a_run_that_was_moved(local, store):
    """Another directory may have its path, with other checkpoints."""
    Mirror(local).upload(store, 10, always)

    def ensure_in_place():
        raise RetryError("the run directory was moved")

    make(store, 20)
    store.quarantine(10)
    mirroring = Mirroring(Mirror(local), store, "mine", lambda text: None, ensure_in_place)
    mirroring.close(5.0)
    assert Mirror(local).steps() == [10]


def first_part(index):
    return index["files"]["__0_0.distcp"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["files"].update({"run/.bashrc": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"/planted": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"..": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"run": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"run/": index["files"]["manifest.json"]}),
        lambda index: index["files"].update({"more.distcp": index["files"]["manifest.json"]}),
        lambda index: index["files"].pop("manifest.json"),
        lambda index: index["files"].pop("index.json"),
        lambda index: index["files"].update({"index.json": index["files"]["manifest.json"]}),
        lambda index: index["files"]["__0_0.distcp"].pop(),
        lambda index: first_part(index).update(key="../secret"),
        lambda index: first_part(index).update(key="step-000000000010/../../secret"),
        lambda index: first_part(index).update(key="run.json"),
        lambda index: first_part(index).update(key=["x"]),
        lambda index: first_part(index).update(size=-1),
        lambda index: first_part(index).update(size=1),
        lambda index: first_part(index).update(size=1 << 60),
        lambda index: first_part(index).update(sha256=None),
        lambda index: first_part(index).pop("key"),
        lambda index: index["files"].update({"__0_0.distcp": None}),
        lambda index: index.update(files=[]),
        lambda index: index.update(step="10"),
        lambda index: index.update(format=None),
        lambda index: index.pop("files"),
    ],
)
def test_a_copy_of_another_form_is_not_restored(local, store, tmp_path, change):
    mirror = Mirror(local)
    mirror.upload(store, 10, always)
    rewrite_index(tmp_path / "mirror", change)
    other = elsewhere(tmp_path)
    step, notes = restore_from_mirror(mirror, other)
    assert step is None
    assert "The mirror's checkpoint of step 10 is damaged" in notes[0]
    assert list(other.directory.iterdir() if other.directory.exists() else []) == []
    assert [path.name for path in other.directory.parent.iterdir()] in ([], ["checkpoints"])


@pytest.mark.parametrize(
    "text", ["{}", "", "[]", "[" * 100_000, "\xff", '{"files": {}}'], ids=range(6)
)
def test_an_index_that_is_no_index_is_not_restored(local, store, tmp_path, text):
    mirror = Mirror(local)
    mirror.upload(store, 10, always)
    path = tmp_path / "mirror/step-000000000010/mirror.json"
    path.write_text(text, encoding="latin-1")
    step, notes = restore_from_mirror(mirror, elsewhere(tmp_path))
    assert step is None
    assert "damaged" in notes[0]


def test_a_copy_that_is_refused_for_its_content_is_not_restored(local, store, tmp_path):
    make(store, 20)
    mirror = Mirror(local)
    for step in (10, 20):
        mirror.upload(store, step, always)
    other = elsewhere(tmp_path)

    def check(path):
        if Manifest.read(path).step == 20:
            raise DamagedError("its index names /etc/passwd")

    step, notes = restore_from_mirror(mirror, other, check)
    assert step == 10
    assert "/etc/passwd" in notes[0]
    assert other.steps() == [10]


def test_what_differs_from_the_manifest_is_not_sent(local, store):
    data = store.path(10) / "__0_0.distcp"
    data.write_bytes(b"?" * LARGE)
    with pytest.raises(DamagedError, match=r"__0_0\.distcp does not match its SHA-256"):
        Mirror(local).upload(store, 10, always)
    assert Mirror(local).steps() == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-000000000010/__0_0.distcp"])
def test_a_linked_file_is_not_sent(local, store, tmp_path, name):
    """The run directory may come from somebody who wants a file of this user."""
    (tmp_path / "secret").write_bytes(b"secret")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret")
    with pytest.raises((DamagedError, OSError)):
        Mirror(local).upload(store, 10, always)
    sent = [path for path in (tmp_path / "mirror").rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in sent)


def test_a_linked_file_of_the_run_directory_is_not_written_through(local, store, tmp_path):
    mirror = Mirror(local)
    mirror.upload(store, 10, always)
    other = elsewhere(tmp_path)
    (other.directory.parent / "ledger.bin").symlink_to(tmp_path / "planted")
    assert restore_from_mirror(mirror, other)[0] == 10
    assert not (tmp_path / "planted").exists()


def replaced(path, kind, target):
    """Puts a link or another irregular file in place of what is at the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        path.rename(target)
    else:
        path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "a link to a device" else target)


STEP = "step-000000000010"
IRREGULAR = ("a link", "a FIFO", "a link to a device")


@pytest.mark.parametrize("kind", IRREGULAR)
def test_an_irregular_owner_is_refused(local, store, tmp_path, kind):
    """It blocks nothing, is not read, and what it leads to is not written."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    replaced(tmp_path / "mirror/run.json", kind, victim)
    for refused in (Mirror(local).owner, lambda: Mirror(local).claim("mine")):
        with pytest.raises(
            MirrorError, match=r"mirror/run\.json: it is .*, not a regular"
        ) as caught:
            refused()
        assert caught.value.is_misconfigured
    assert victim.read_text() == "kept"


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["mirror.json", "manifest.json", "run/run.json"])
def test_no_irregular_object_of_a_copy_is_used(local, store, tmp_path, kind, name):
    mirror = Mirror(local)
    mirror.upload(store, 10, always)
    (path,) = (tmp_path / "mirror" / STEP).glob(name + "*")
    replaced(path, kind, victim := tmp_path / "victim")
    with pytest.raises(MirrorError, match="not a regular file"):
        mirror.upload(store, 10, always)
    assert not victim.exists()
    with pytest.raises(UsageError, match=r"(?s)not a regular file.*kind of its files"):
        restore_from_mirror(mirror, other := elsewhere(tmp_path))
    assert other.steps() == []


@pytest.mark.parametrize("folder", [STEP, f"{STEP}/run"])
def test_a_linked_folder_of_a_copy_is_refused(local, store, tmp_path, folder):
    mirror, victim = Mirror(local), tmp_path / "victim"
    mirror.upload(store, 10, always)
    replaced(tmp_path / "mirror" / folder, "a link", victim)
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    with pytest.raises(MirrorError, match="not a directory"):
        mirror.upload(store, 10, always)
    with pytest.raises(UsageError, match="not a directory"):
        restore_from_mirror(mirror, elsewhere(tmp_path))
    if folder == STEP:
        with pytest.raises(MirrorError, match="not a directory"):
            mirror.remove(10)
    assert {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()} == before


def test_a_copy_is_not_written_into_a_linked_folder(local, store, tmp_path):
    (victim := tmp_path / "victim").mkdir()
    replaced(tmp_path / "mirror" / STEP, "a link", victim.rename(tmp_path / "elsewhere"))
    with pytest.raises(MirrorError, match="not a directory"):
        Mirror(local).upload(store, 10, always)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_mirror_may_be_a_link(store, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "mirror").symlink_to(tmp_path / "large")
    mirror = Mirror(MirrorConfig(url=f"file://{tmp_path}/mirror"))
    mirror.claim("mine")
    mirror.upload(store, 10, always)
    assert restore_from_mirror(mirror, elsewhere(tmp_path))[0] == 10
    mirror.remove(10)
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["run.json"]


@pytest.mark.parametrize("told", [None, 4])
def test_an_object_that_is_larger_than_said_is_not_read(told):
    """A server may say another size than it sends, or none."""
    requested = []

    class Files:
        def info(self, path):
            return {"size": told}

        def cat_file(self, path, start, end):
            requested.append((start, end))
            return bytes(100)[start:end]

    assert UrlStorage(Files(), "bucket").read("key", 8) == b""
    assert requested == [(0, 9)]
