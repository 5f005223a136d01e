"""A run that is lost and found in W&B (I4), and commands that take its checkpoint from there."""

import json
import shutil
from types import SimpleNamespace

import pytest

from tests.support.forked import command, run
from tests.support.runs import TINY, assert_same_bits, curve, tensors
from train.artifacts.runs import received_runs
from train.checkpoint.run_directory import RunDirectory
from train.config.load import load_config
from train.exits import DataError, ResumeRefusedError, UsageError
from train.setup.find_run import find_run

BASE = ["checkpoint.every_steps=5", "checkpoint.asynchronous=false", "evaluate.every_steps=10"]
NAME = "wandb:me/isorun/it:best"
RUN_FILES = ("run.json", "config.json", "attempts.jsonl", "ledger.bin", "metrics.jsonl")
ALONE = SimpleNamespace(rank=0, broadcast_pickled=lambda value: value)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was killed after step 20 of 40."""
    directory = tmp_path_factory.mktemp("half") / "run"
    run("fit", directory, *BASE, "task.kill_at_step=23", expect=-9)
    return directory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *BASE)
    return directory


def content(directory):
    """The files of the artifact of a run's newest checkpoint."""
    checkpoint = sorted((directory / "checkpoints").glob("step-*"))[-1]
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    return files | {f"run/{name}": (directory / name).read_bytes() for name in RUN_FILES}


def add(artifacts, files):
    return artifacts.add("it", files, aliases=("latest", "best"))


def identity(directory):
    return json.loads((directory / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.process
def test_a_run_goes_on_on_an_empty_disk(half, undisturbed, server, tmp_path):
    add(server.artifacts, content(half))
    directory, options = tmp_path / "run", [*BASE, f"checkpoint.restore_from={NAME}"]
    done = run("fit", directory, *options)
    said = done.stdout + done.stderr
    assert "Restored the checkpoint of step 20 from wandb:me/isorun/it:v0." in said
    assert identity(directory) == identity(half)
    attempts = [json.loads(line) for line in (directory / "attempts.jsonl").open()]
    assert [a["attempt"] for a in attempts] == [1, 2]
    assert attempts[1]["resumed_from_step"] == 20
    assert "all well" in run("verify", directory).stdout
    assert_same_bits(tensors(undisturbed), tensors(directory))
    for key in ("train/loss", "eval/loss"):
        assert curve(undisturbed, key) == curve(directory, key)
    assert not (directory / "restore").exists()
    server.artifacts.all.clear()
    assert "already finished" in run("fit", directory, *options).stdout


@pytest.mark.slow
def test_new_runs_and_other_commands_take_its_checkpoint(half, server, tmp_path):
    add(server.artifacts, content(half))
    trust = "task.use=tests.support.tiny:TinyTask"
    assert "which others may have made" in command("evaluate", NAME, expect=64).stderr
    local = json.loads(command("evaluate", half, "--json").stdout)
    found = json.loads(command("evaluate", NAME, trust, "--json").stdout)
    assert found == {**local, "checkpoint": "wandb:me/isorun/it:v0"}
    of_mine = command("evaluate", half, "--checkpoint", NAME, "--json").stdout
    assert json.loads(of_mine) == found
    assert "add --to DIR" in command("export", NAME, trust, expect=64).stderr
    export = [trust, "--form", "parameters", "--to", tmp_path / "export"]
    command("export", NAME, *export)
    command("export", half, "--form", "parameters", "--to", tmp_path / "local")
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("export", "local")]
    assert weights[0] == weights[1]
    directory = tmp_path / "tuned"
    done = run("fit", directory, "length.steps=1", "schedule.warmup_steps=0", "optim.lr=1e-30",
               f"init_from={NAME}")  # fmt: skip
    assert "tensors of the model are loaded from wandb:me/isorun/it:v0, step 20" in done.stdout
    before, after = tensors(half), tensors(directory)
    for name in (name for name in before if name.startswith("model.")):
        assert before[name].equal(after[name]), name
    [record] = [json.loads(line) for line in (directory / "attempts.jsonl").open()]
    assert record["init_from"]["path"] == "wandb:me/isorun/it:v0"
    assert not (directory / "init_from").exists()


@pytest.mark.slow
def test_a_run_that_cannot_be_had_never_starts_from_the_beginning(server, tmp_path):
    directory = tmp_path / "run"
    options = [*BASE, f"checkpoint.restore_from={NAME}"]
    missing = run("fit", directory, *options, expect=64)
    assert "checkpoint.restore_from is 'wandb:me/isorun/it:best'" in missing.stderr
    assert "Traceback" not in missing.stderr
    server.fault = lambda operation: 500
    assert "rerun when it can" in run("fit", directory, *options, expect=75).stderr
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["lock"]


def restore(directory, *overrides):
    options = [*TINY, *BASE, f"run.dir={directory}", f"checkpoint.restore_from={NAME}"]
    loaded = load_config([], [*options, *overrides], runs=False)
    opened = RunDirectory(loaded.run_directory)
    try:
        return find_run(ALONE, loaded, opened, [], allow_changes=False)
    finally:
        opened.release()


def refused(error, text, directory, *overrides):
    with pytest.raises(error) as refusal:
        restore(directory, *overrides)
    assert text in str(refusal.value)
    left = [p.name for p in directory.rglob("*") if p.is_file() and p.name != "run.json"]
    assert left == ["lock"]


def test_what_is_not_this_run_is_not_restored(half, artifacts, tmp_path):
    files = content(half)
    add(artifacts, files)
    directory = tmp_path / "run"
    refused(ResumeRefusedError, "optim.lr: 0.01 -> 0.5", directory, "optim.lr=0.5")
    (directory / "run.json").write_text(json.dumps({**identity(half), "id": "other"}))
    refused(ResumeRefusedError, "holds the run 'other'", directory)
    shutil.copy(half / "run.json", directory)
    assert restore(directory).resume_step == 20
    artifacts.all.clear()
    assert restore(directory).resume_step == 20, "it has its own checkpoint now"


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"run/run.json": None}, DataError, "lacks run/run.json"),
        ({"run/ledger.bin": None}, DataError, "lacks run/ledger.bin"),
        ({"run/run.json": b"{"}, DataError, "run/run.json cannot be read"),
        ({"run/run.json": b'{"id": "other"}'}, DataError, "not of the run other"),
        ({"run/config.json": b"[]"}, DataError, "config.json cannot be read"),
        ({"manifest.json": None}, UsageError, "an artifact without manifest.json"),
        ({"index.json": None}, DataError, "index.json of step 20"),
        ({"more.distcp": b"x"}, DataError, "more.distcp of step 20"),
    ],
)
def test_an_artifact_that_is_not_whole(changes, error, text, half, artifacts, tmp_path):
    files = {name: data for name, data in (content(half) | changes).items() if data is not None}
    add(artifacts, files)
    refused(error, text, tmp_path / "run")


def test_a_project_on_the_command_line_completes_a_name(monkeypatch, tmp_path):
    named = []
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def restore_artifact(name, *_, **__):
        named.append(name)
        raise UsageError("enough")

    monkeypatch.setattr("train.artifacts.runs.restore_artifact", restore_artifact)
    words = ["track.wandb_project=p", "track.wandb_entity=e"]
    with pytest.raises(UsageError, match="enough"), received_runs(["wandb:it"], "newest", words):
        pass
    assert named == ["e/p/it:latest"]
