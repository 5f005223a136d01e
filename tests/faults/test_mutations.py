"""Mutated files of run directories, exports and launch logs: each command ends with a documented
exit code and without a traceback.

The mutations are drawn from seeds. The first seeds are tried by ``make test``, within one process;
``make test-all`` tries more, and resumes runs.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

import train
from launch.cli import main as launch
from tests.support.forked import Command
from tests.support.lanes import slow
from tests.support.mutations import mutate_checkpoint, mutate_file
from tests.support.runs import ROOT, TINY
from train.checkpoint import dcp
from train.checkpoint.index import INDEX, PICKLED_INDEX, to_json
from train.checkpoint.manifest import MANIFEST, Manifest, hash_file
from train.cli import main
from train.exits import DataError, Exit, UsageError

FORMER = ROOT / "tests/data/run-0.1.0"
CONFIG = [
    *TINY, "checkpoint.every_steps=10", "evaluate.every_steps=8", "task.sleep=0", "ema.decay=0.9",
    "run.name=single", "checkpoint.keep_best.metric=loss",
]  # fmt: skip
DOCUMENTED = set(Exit) - {Exit.INTERNAL}
FAST = 6


def seeds(count):
    """Seeds for parametrize: the first for ``make test``, the others for ``make test-all``."""
    return [seed if seed < FAST else slow(seed) for seed in range(count)]


def former(target):
    """A run directory of version 0.1.0, whose checkpoints have only the pickled index."""
    return Path(shutil.copytree(FORMER / "single", target))


def present(target):
    """The same run with the index of this version."""
    directory = former(target)
    for checkpoint in (directory / "checkpoints").iterdir():
        manifest = Manifest.read(checkpoint)
        (checkpoint / INDEX).write_text(to_json(dcp.read_index(checkpoint)))
        (checkpoint / PICKLED_INDEX).unlink()
        del manifest.files[PICKLED_INDEX]
        manifest.files[INDEX] = hash_file(checkpoint / INDEX)
        (checkpoint / MANIFEST).write_text(manifest.to_json())
    return directory


def mutate(directory, random):
    """Mutates a file of the run directory; returns its name."""
    names = ["run.json", "config.json", "attempts.jsonl", "ledger.bin", "metrics.jsonl"]
    (directory / "finished.json").write_text('{"step": 16, "metrics": {}}')
    if random.randrange(2):
        (directory / "finished.json").unlink()
    else:
        names.append("finished.json")
    name = random.choice([*names, *["checkpoint"] * 6])
    if name == "checkpoint":
        mutate_checkpoint(random.choice(sorted((directory / "checkpoints").iterdir())), random)
    else:
        mutate_file(directory / name, random)
    return name


@pytest.fixture(params=[former, present], ids=["former", "present"])
def make(request):
    return request.param


def check(code, captured):
    assert code in DOCUMENTED, captured.err
    assert "Traceback" not in captured.err, captured.err
    return code


@pytest.mark.parametrize("seed", seeds(150))
def test_verify(make, tmp_path, capsys, seed):
    directory, random = make(tmp_path / "run"), Random(seed)
    mutate(directory, random)
    words = [*CONFIG, f"run.dir={directory}"] if seed % 2 else [str(directory)]
    check(main(["verify", *words]), capsys.readouterr())


def test_verify_finds_nothing_in_the_run_itself(make, tmp_path, capsys):
    assert main(["verify", *CONFIG, f"run.dir={make(tmp_path / 'run')}"]) == 0


@pytest.mark.parametrize("seed", seeds(60))
def test_commands_that_look_at_runs(make, tmp_path, capsys, seed):
    directory, random = make(tmp_path / "run"), Random(4000 + seed)
    intact = make(tmp_path / "intact")
    (directory / "finished.json").write_text('{"step": 16, "metrics": {"loss": 1.0}}')
    names = ["run.json", "config.json", "attempts.jsonl", "metrics.jsonl", "finished.json"]
    for name in random.sample(names, seed % 4):
        mutate_file(directory / name, random)
    if seed % 4 == 0:
        mutate_checkpoint(random.choice(sorted((directory / "checkpoints").iterdir())), random)
    for words in (["runs", tmp_path], ["runs", "--json", "--sort=best", tmp_path]):
        assert check(main(list(map(str, words))), capsys.readouterr()) == 0
    pair = [directory, intact] if seed % 2 else [intact, directory]
    for words in (["compare", *pair], ["compare", "--json", *pair], ["logs", directory]):
        check(main(list(map(str, words))), capsys.readouterr())


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize("seed", [slow(seed) for seed in range(25)])
def test_evaluate_and_export(make, tmp_path, command, seed):
    directory, random = make(tmp_path / "run"), Random(1000 + seed)
    mutate(directory, random)
    to = ["--form", "parameters", "--to", str(tmp_path / "export")] if command == "export" else []
    done = Command(command, *CONFIG, f"run.dir={directory}", *to).wait()
    assert done.returncode in DOCUMENTED, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seed", [slow(seed) for seed in range(40)])
def test_resume(make, tmp_path, seed):
    directory, random = make(tmp_path / "run"), Random(2000 + seed)
    mutate(directory, random)
    if not random.randrange(4):
        (directory / "stopped.json").write_text('{"launch": "x", "restarts": 1}')
        mutate_file(directory / "stopped.json", random)
    done = Command("fit", *CONFIG, f"run.dir={directory}").wait()
    assert done.returncode in DOCUMENTED, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    directory = former(tmp_path_factory.mktemp("exported") / "run")
    words = [*CONFIG, f"run.dir={directory}", "--to", str(directory.parent / "export")]
    done = Command("export", *words, "--form", "parameters").wait()
    assert done.returncode == 0, done.stderr
    return directory.parent / "export"


@pytest.mark.parametrize("seed", [slow(seed) for seed in range(60)])
def test_load_of_an_export(exported_once, tmp_path, seed):
    directory = Path(shutil.copytree(exported_once, tmp_path / "export"))
    random = Random(3000 + seed)
    name = random.choice(["export.json", "model.safetensors"])
    mutate_file(directory / name, random)
    with suppress(UsageError, DataError):
        train.load(directory)


@pytest.mark.parametrize("command", [["history", "--offline"], ["show", "launched"]])
@pytest.mark.parametrize("seed", seeds(150))
def test_launch_log(tmp_path, monkeypatch, capsys, command, seed):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "isorun").mkdir()
    path = Path(shutil.copy(FORMER / "launches.jsonl", tmp_path / "isorun"))
    mutate_file(path, Random(4000 + seed))
    check(launch(command), capsys.readouterr())


def test_a_launch_without_a_field_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "isorun").mkdir()
    lines = (FORMER / "launches.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    damaged = [{**first, "handle": "x://y/z", key: value} for key, value in
               [("time", 1e300), ("time", None), ("nodes", "1"), ("directory", "a\0b"),
                ("pid", -1), ("command", None), ("git", {"commit": 1})]]  # fmt: skip
    damaged += [{"event": "cancelled", "handle": first["handle"], key: value} for key, value in
                [("time", "x"), ("time", float("nan")), ("pid", "x"), ("directory", 3)]]  # fmt: skip
    text = "\n".join([*lines, *map(json.dumps, damaged), "[" * 100_000, ""])
    (tmp_path / "isorun/launches.jsonl").write_text(text)
    assert launch(["history", "--offline"]) == 0
    said = capsys.readouterr().out
    assert first["handle"] in said
    assert "x://y/z" not in said
