"""Files of another run, or of another step, in a run directory: they are never used."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.forked import run
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors
from train.checkpoint.consistency import contradictions
from train.checkpoint.layout import dumps_with_sha256
from train.checkpoint.opening import fault_of_run
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.store import CheckpointStore

BASE = ["checkpoint.every_steps=10", "checkpoint.keep_last=99", "evaluate.every_steps=10"]
KILLED = [*BASE, "task.kill_at_step=36", "checkpoint.asynchronous=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs: ``mine``, and others that differ in one value."""
    made = {}
    for name, changes in (
        ("mine", []),
        ("twin", []),
        ("seed", ["run.seed=5"]),
        ("batch", ["batch.global_batch_size=10"]),
        ("size", ["data.size=97"]),
    ):
        made[name] = tmp_path_factory.mktemp("runs") / name
        run("fit", made[name], *BASE, *changes)
    return made


@pytest.fixture
def mine(runs, tmp_path):
    return shutil.copytree(runs["mine"], tmp_path / "mine")


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    run("fit", directory, *KILLED, expect=-9)
    return directory


@pytest.fixture
def killed(killed_once, tmp_path):
    """A run that was killed after step 35, with checkpoints of steps 10, 20 and 30."""
    return shutil.copytree(killed_once, tmp_path / "killed")


def checkpoint(directory, step):
    return directory / f"checkpoints/step-{step:012d}"


def edit_manifest(directory, step, change):
    """Changes a manifest so that its own hash is right."""
    path = checkpoint(directory, step) / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_text(dumps_with_sha256(body))


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_lines(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def swap_checkpoint(directory, source, step, to=None):
    shutil.rmtree(checkpoint(directory, to or step), ignore_errors=True)
    shutil.copytree(checkpoint(source, step), checkpoint(directory, to or step))


def as_of_an_older_version(directory):
    """Removes the values that version 0.1.0 did not write."""
    for step in checkpoints(directory):
        edit_manifest(
            directory, step, lambda body: [body["state"].pop(k) for k in ("seed", "batch")]
        )

    def strip(rows):
        new = ("run", "seed", "samples", "batch", "ended")
        return [{k: v for k, v in row.items() if k not in new} for row in rows]

    edit_lines(directory / "attempts.jsonl", strip)
    finished = json.loads((directory / "finished.json").read_text())
    del finished["run"]
    (directory / "finished.json").write_text(json.dumps(finished))


@pytest.mark.slow
def test_a_run_does_not_contradict_itself(runs, mine):
    for directory in runs.values():
        assert contradictions(RunDirectory(directory)) == []
    as_of_an_older_version(mine)
    assert contradictions(RunDirectory(mine)) == []


FOREIGN = [
    ("seed", "ledger.bin", ["manifest.json has seed 0", "ledger.bin has 5"]),
    ("batch", "ledger.bin", ["manifest.json has position 120", "ledger.bin has 100"]),
    ("size", "ledger.bin", ["manifest.json has samples 103", "ledger.bin has 97"]),
    ("twin", "attempts.jsonl", ["attempts.jsonl has run ", "run.json has "]),
    ("twin", "finished.json", ["finished.json has run ", "run.json has "]),
    ("twin", "run.json", ["manifest.json has run ", "run.json has "]),
    ("seed", "config.json", ["config.json has seed 5", "ledger.bin has 0"]),
    ("batch", "config.json", ["config.json has global_batch_size 10", "ledger.bin has 12"]),
    ("batch", "metrics.jsonl", ["metrics.jsonl has train/epoch 0.0970874", "ledger.bin has 0.11"]),
    ("size", "metrics.jsonl", ["metrics.jsonl has train/epoch ", "ledger.bin has "]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "named"), FOREIGN)
def test_verify_names_both_files_and_both_values(runs, mine, source, name, named):
    shutil.copy(runs[source] / name, mine / name)
    text = "\n".join(contradictions(RunDirectory(mine)))
    for part in named:
        assert part in text


@pytest.mark.parametrize(
    ("source", "name"), [(s, n) for s, n, _ in FOREIGN if s != "twin" and n != "config.json"]
)
def test_files_of_an_older_version_are_compared_by_what_they_have(runs, mine, source, name):
    shutil.copy(runs[source] / name, mine / name)
    as_of_an_older_version(mine)
    assert contradictions(RunDirectory(mine))


def forged_position(directory):
    def change(body):
        body["state"]["progress"]["position"] += 12

    edit_manifest(directory, 30, change)


def another_progress(directory):
    def change(body):
        body["state"]["progress"]["step"] = 20

    edit_manifest(directory, 30, change)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (forged_position, ["manifest.json has position 372 at step 30", "ledger.bin has 360"]),
        (another_progress, ["is of step 30, but its progress is 20"]),
        (
            lambda d: edit_json(d / "finished.json", step=20, position=240),
            ["finished.json has step 20 as the last", "manifest.json has step 40"],
        ),
        (
            lambda d: edit_json(d / "finished.json", position=1),
            ["finished.json has position 1", "manifest.json has 480"],
        ),
        (
            lambda d: edit_lines(d / "metrics.jsonl", lambda rows: [*rows, {"step": 41}]),
            ["metrics.jsonl has step 41", "finished.json has 40"],
        ),
        (
            lambda d: edit_lines(d / "metrics.jsonl", lambda rows: [*rows[:9], *rows[4:]]),
            ["metrics.jsonl has step 5 after step 9"],
        ),
        (
            lambda d: edit_lines(
                d / "metrics.jsonl", lambda rows: [row | {"attempt": 3} for row in rows]
            ),
            ["metrics.jsonl has attempt 3 at step 1", "ledger.bin ends at 1"],
        ),
        (
            lambda d: edit_lines(d / "attempts.jsonl", lambda rows: rows + rows),
            ["attempts.jsonl has attempt 1 in line 2"],
        ),
        (
            lambda d: edit_lines(
                d / "attempts.jsonl", lambda rows: [row | {"resumed_from_step": 7} for row in rows]
            ),
            ["attempts.jsonl has attempt 1 resumed from step 7", "ledger.bin has step 0"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else getattr(value, "__name__", ""),
)  # fmt: skip
def test_verify_compares_positions_steps_and_attempts(mine, damage, named):
    damage(mine)
    text = "\n".join(contradictions(RunDirectory(mine)))
    for part in named:
        assert part in text


def test_verify_fails_and_prints_the_contradiction(runs, mine):
    shutil.copy(runs["twin"] / "finished.json", mine)
    lines = run("verify", mine, expect=65).stdout.splitlines()
    assert [line for line in lines if line.startswith("contradiction: ")]
    assert lines[-1] == "NOT well"


def test_a_changed_batch_size_and_a_longer_run_are_no_contradictions(mine):
    run(
        "fit", mine, *BASE, "length.steps=50", "batch.global_batch_size=10", "run.seed=3",
        "--allow-changes",
    )  # fmt: skip
    assert "all well" in run("verify", mine).stdout


def test_a_checkpoint_of_another_run_is_set_aside(runs, killed):
    """Its step is later than those of the run, so it would be resumed from."""
    swap_checkpoint(killed, runs["seed"], 40)
    done = run("fit", killed, *BASE)
    (warning,) = done.stderr.splitlines()
    assert "The checkpoint of step 40 is of another run" in warning
    assert "manifest.json has run " in warning
    assert "run.json has " in warning
    assert "resumes at step 30" in done.stdout
    assert_same_bits(tensors(runs["mine"]), tensors(killed))
    assert curve(killed) == curve(runs["mine"])
    assert "all well" in run("verify", killed).stdout


def test_a_checkpoint_under_the_name_of_another_step_is_set_aside(runs, killed):
    swap_checkpoint(killed, killed, 10, to=35)
    done = run("fit", killed, *BASE)
    assert "step-000000000035/manifest.json belongs to step 10" in done.stderr
    assert_same_bits(tensors(runs["mine"]), tensors(killed))


def test_a_run_with_only_checkpoints_of_another_run_is_refused(runs, killed):
    """It would start from the beginning, although run.json may be the wrong file."""
    shutil.rmtree(killed / "checkpoints")
    shutil.copytree(runs["twin"] / "checkpoints", killed / "checkpoints")
    done = run("fit", killed, *BASE, expect=76)
    (line,) = done.stderr.splitlines()
    assert "manifest.json has run " in line
    assert "run.json has " in line
    assert checkpoints(killed) == [10, 20, 30, 40]


@pytest.mark.parametrize("source", ["seed", slow("batch"), slow("size")])
def test_a_ledger_of_another_run_is_refused(runs, killed, source):
    shutil.copy(runs[source] / "ledger.bin", killed)
    before = (killed / "ledger.bin").read_bytes()
    (line,) = run("fit", killed, *BASE, expect=76).stderr.splitlines()
    assert "manifest.json has " in line
    assert f"{killed / 'ledger.bin'} has " in line
    assert (killed / "ledger.bin").read_bytes() == before


def test_an_edited_config_does_not_change_the_order_of_a_run(killed):
    path = killed / "config.json"
    config = json.loads(path.read_text())
    config["run"]["seed"] = 99
    path.write_text(json.dumps(config))
    done = run("fit", killed, *KILLED, "run.seed=99", "--allow-changes", expect=76)
    assert f"{path} has seed 99 in attempt 1, but {killed / 'ledger.bin'} has 0" in done.stderr


def test_attempts_of_another_run_are_refused(runs, killed):
    shutil.copy(runs["twin"] / "attempts.jsonl", killed)
    (line,) = run("fit", killed, *BASE, expect=76).stderr.splitlines()
    assert "attempts.jsonl has run " in line
    assert len((killed / "attempts.jsonl").read_text().splitlines()) == 1


def test_metrics_of_another_run_are_set_aside(runs, killed):
    shutil.copy(runs["batch"] / "metrics.jsonl", killed)
    done = run("fit", killed, *BASE)
    (warning,) = done.stderr.splitlines()
    assert "metrics.jsonl has train/epoch " in warning
    assert "ledger.bin has " in warning
    (aside,) = killed.glob("metrics.jsonl.damaged-*")
    assert aside.name in warning
    assert min(curve(killed)) == 31
    assert "all well" in run("verify", killed).stdout


def test_checkpoints_without_an_identity_are_refused(runs, tmp_path):
    shutil.copytree(runs["mine"] / "checkpoints", tmp_path / "run/checkpoints")
    (line,) = run("fit", tmp_path / "run", *BASE, expect=76).stderr.splitlines()
    assert "config.json is damaged (it is missing), so the run cannot be identified" in line
    assert checkpoints(tmp_path / "run") == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "damage",
    [
        lambda runs, d: shutil.copy(runs["twin"] / "finished.json", d),
        lambda runs, d: shutil.copy(runs["batch"] / "finished.json", d),
        lambda runs, d: edit_json(d / "finished.json", step=20, position=240),
        lambda runs, d: (d / "finished.json").write_text('{"step": "many"}'),
    ],
    ids=["run", "batch", "step", "content"],
)
def test_a_finished_json_that_is_not_of_the_run_is_refused(runs, mine, damage):
    """It would say that the run is complete."""
    damage(runs, mine)
    (line,) = run("fit", mine, *BASE, expect=76).stderr.splitlines()
    assert "finished.json" in line


def test_evaluate_refuses_a_checkpoint_of_another_run(runs, mine):
    swap_checkpoint(mine, runs["seed"], 40)
    (line,) = run("evaluate", mine, *BASE, expect=65).stderr.splitlines()
    assert "manifest.json has run " in line
    run("evaluate", mine, *BASE, "--checkpoint", "30")


def test_a_checkpoint_is_named_from_its_own_directory(runs, mine, monkeypatch):
    monkeypatch.chdir(mine / "checkpoints")
    assert fault_of_run(Path("step-000000000030")) is None
    swap_checkpoint(mine, runs["twin"], 30)
    assert "manifest.json has run " in fault_of_run(Path("step-000000000030"))


@pytest.mark.parametrize("content", [{}, {"state": []}, {"files": {"../x": {}}}, {"step": "3"}])
def test_a_manifest_of_another_form_is_damage(killed, content):
    def change(body):
        body.update(content) if content else body.clear()

    edit_manifest(killed, 30, change)
    (problem,) = CheckpointStore(killed / "checkpoints").problems(30)
    assert "manifest.json" in problem
