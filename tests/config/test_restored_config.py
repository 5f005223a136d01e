"""The config that a mirror has is compared before it is installed, and never installed itself."""

import json
from types import SimpleNamespace

import pytest

from tests.support.runs import TINY
from train.checkpoint.index import to_json
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.mirror import Mirror
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore
from train.config.load import load_config
from train.exits import ResumeRefusedError
from train.setup import find_run as module

ALONE = SimpleNamespace(rank=0, broadcast_pickled=lambda value: value)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_check_content", lambda checkpoint: None)
    url = f"checkpoint.mirror.url=file://{tmp_path}/mirror"
    return load_config([], [*TINY, f"run.dir={tmp_path}/mine", url], runs=False)


def upload(loaded, tmp_path, **values):
    """Makes a mirror with a checkpoint of a run whose config has other values."""
    run = RunDirectory(tmp_path / "theirs")
    run.path.mkdir()
    run.identity("theirs")
    config = loaded.config.model_dump(mode="json")
    for section, changed in values.items():
        config[section] = {**config[section], **changed} if isinstance(changed, dict) else changed
    run.store_config(config)
    store = CheckpointStore(run.checkpoints)
    temporary = store.begin(10)
    (temporary / "index.json").write_text(to_json({}))
    files = {"index.json": hash_file(temporary / "index.json")}
    store.commit(temporary, Manifest(step=10, files=files, state={}, metrics={}))
    mirror = Mirror(loaded.config.checkpoint.mirror)
    mirror.claim(run.identity("").id)
    mirror.upload(store, 10, lambda: True)


def find(loaded, *, allow=False):
    directory = RunDirectory(loaded.run_directory)
    try:
        return directory, module.find_run(ALONE, loaded, directory, [], allow_changes=allow)
    finally:
        directory.release()


def test_a_refused_config_leaves_nothing_of_the_mirror(loaded, tmp_path):
    upload(loaded, tmp_path, task={"use": "evil:Task"})
    with pytest.raises(ResumeRefusedError, match="task.use: 'evil:Task' ->"):
        find(loaded)
    left = [path for path in loaded.run_directory.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["lock"]


@pytest.mark.parametrize(
    ("values", "allow"),
    [
        ({"task": {"use": "evil:Task"}}, True),
        ({"strategy": "evil:Strategy"}, False),
        ({"hooks": [{"use": "evil:Hook", "options": {}}]}, False),
    ],
)
def test_code_that_a_mirrors_config_names_is_not_installed(loaded, tmp_path, values, allow):
    upload(loaded, tmp_path, **values)
    directory, attempt = find(loaded, allow=allow)
    assert attempt.resume_step == 10
    assert [change.key.partition(".")[0] for change in attempt.changes] == list(values)
    assert "evil" not in directory.config_path.read_text()
    assert directory.stored_config() == loaded.config.model_dump(mode="json")


def test_the_config_of_the_run_directory_stays(loaded, tmp_path):
    upload(loaded, tmp_path, strategy="evil:Strategy")
    mine = RunDirectory(loaded.run_directory)
    mine.path.mkdir()
    before = {**loaded.config.model_dump(mode="json"), "strategy": "ddp"}
    mine.config_path.write_text(json.dumps(before))
    directory, attempt = find(loaded)
    assert [str(change) for change in attempt.changes] == ["strategy: 'ddp' -> 'auto'"]
    assert directory.stored_config() == before
