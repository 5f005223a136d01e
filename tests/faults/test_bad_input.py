"""Errors on the command line, in the corpus or in the dataset: one sentence and its exit code."""

import json
import os
import shlex
import subprocess
import sys

import pytest

import train
from tests.support.forked import command, quick, run
from tests.support.lanes import slow
from tests.support.runs import ROOT, TINY, assert_same_bits, environment, tensors
from train import cli
from train.config.load import load_config

TEXT = [
    "task.use=text", "task.sample_tokens=8", "model.layers=1", "model.heads=2", "model.width=16",
    "data.context=32", "batch.global_batch_size=4", "length.steps=2",
    "track.tensorboard=false", "track.wandb=disabled",
]  # fmt: skip


def only_line(done):
    """The single line on stderr."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("isorun: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr must be a number, but is 'fast'"),
        ("batch.micro_batch_size=13", "more than batch.global_batch_size, 12"),
        ("model.hiden=3", "did you mean model.hidden?"),
        ("--resume", "nknown argument '--resume'"),
        ("run.dir=new\nline", "has a line break, which YAML takes for a space; quote the value"),
        ('run.dir="a\\0b"', "run.dir must be a path without a null character, but is 'a\\x00b'"),
        ("run.dir=$SOME_NAME/x", "in which $SOME_NAME is not replaced by a value; write ${oc.env:"),
        (f"run.dir={'b' * 256}", "is longer than the file system allows; choose a shorter one"),
        (f"run.dir={'/'.join(['c' * 200] * 20)}", "so that those of its files would be too long"),
    ],
)
def test_a_misspelt_key_or_an_invalid_value(tmp_path, override, expected):
    done = run("fit", tmp_path / "run", override, expect=64)
    assert expected in only_line(done)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "files were created"


@pytest.mark.slow
def test_the_printed_commands_take_any_name_of_a_run(tmp_path, monkeypatch, capsys):
    """Also one that looks like an override or an option."""
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "length.steps=1", "schedule.warmup_steps=0"]
    for name in ("a=b", "-dash", "with space", "per%cent", "com,ma", "$1"):
        directory = load_config([], [*words, f"run.dir={name}"])
        word = shlex.split(directory.command("verify"))[-1]
        train.fit(*words, f"run.dir={name}")
        assert cli.main(["verify", word]) == 0
    assert "all well" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["verify", "evaluate", "goodput", "runs"])
def test_a_path_that_is_too_long_is_a_mistake_of_the_command(name):
    assert len(only_line(command(name, "b" * 300, expect=64))) < 500


def test_each_problem_is_one_line(tmp_path):
    done = run("fit", tmp_path / "run", "optim.lrr=1", "precision=fp8", expect=64)
    first, second = done.stderr.splitlines()
    assert "optim.lrr" in first
    assert "precision must be one of fp32, bf16, fp16" in second


def test_an_invalid_value_is_reported_before_anything_heavy_is_imported(tmp_path):
    script = (
        "import sys; from train.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'accelerate', 'sklearn', 'wandb'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    words = ["fit", "task.use=digits", "batch.global_batch_size=0", "length.steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64, done.stderr
    assert "batch.global_batch_size must be at least 1" in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([b"", b""], "The corpus is empty"),
        ([b"fine text " * 99, b"caf\xe9 " * 99], "1.txt (data.files) is not UTF-8: the byte 0xe9 at offset 3"),
        ([b"short", b"tiny"], "fewer than one sample of data.context=32"),
        ([b"only one document " * 9], "leaves none for training"),
        ([], "matches no file"),
    ],
)  # fmt: skip
def test_an_invalid_corpus(tmp_path, content, expected):
    for number, data in enumerate(content):
        (tmp_path / f"{number}.txt").write_bytes(data)
    files = f"data.files=[{tmp_path}/*.txt]"
    done = run("fit", tmp_path / "run", files, base=TEXT, expect=65)
    assert expected in only_line(done)
    # With a valid corpus the same command works: the failure left nothing behind.
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 99)
    run("fit", tmp_path / "run", files, base=TEXT)


@pytest.mark.parametrize("workers", [slow(0), 2])
def test_a_dataset_that_raises_names_index_and_epoch(tmp_path, workers):
    """Each step uses all 12 samples, so step 5 is epoch 4, where the first attempt ends."""
    base = [
        "data.size=12",
        "length.steps=8",
        "checkpoint.every_steps=4",
        "checkpoint.asynchronous=false",  # so that it exists before the kill
        f"loader.workers={workers}",
    ]
    run("fit", tmp_path / "run", *base, "task.kill_at_step=5", "task.sleep=0.05", expect=-9)
    done = run("fit", tmp_path / "run", *base, "data.fail_at=7", expect=65)
    line = next(item for item in done.stderr.splitlines() if "error:" in item)
    assert "failed at index 7 in epoch 4 (position " in line
    assert "ValueError: this sample is broken" in line
    assert "Traceback" not in done.stderr
    assert "this sample is broken" in (tmp_path / "run/logs/rank-0.log").read_text()
    run("fit", tmp_path / "run", *base)
    run("fit", tmp_path / "straight", *base)
    assert_same_bits(tensors(tmp_path / "run"), tensors(tmp_path / "straight"))


def test_a_wrong_count_is_refused(tmp_path):
    line = only_line(run("fit", tmp_path, "task.wrong_count=true", expect=64))
    assert "returned a count of" in line
    assert "count(batch) returns" in line


def test_an_iterable_dataset_is_refused_with_what_is_supported(tmp_path):
    line = only_line(run("fit", tmp_path, "task.use=tests.faults.tasks:OfStream", expect=64))
    assert "train_dataset() returned a Stream" in line
    assert "__getitem__(index)" in line


def test_a_measure_without_a_count_is_refused(tmp_path):
    line = only_line(run("fit", tmp_path, "task.use=tests.faults.tasks:BadMeasure", expect=64))
    assert "measure() returned Tensor for 'loss'" in line


def test_a_task_without_evaluation_data(tmp_path):
    task = "task.use=tests.faults.tasks:WithoutEvaluation"
    run("fit", tmp_path / "a", task)
    assert json.loads((tmp_path / "a/finished.json").read_text())["metrics"] == {}
    done = run("fit", tmp_path / "b", task, "evaluate.every_steps=5", expect=65)
    assert "has no evaluation data" in only_line(done)
    done = run("evaluate", tmp_path / "a", task, expect=64)
    assert "has no evaluation data" in only_line(done)


def test_an_unexpected_exception_shows_its_traceback(tmp_path):
    task = ["task.use=tests.faults.tasks:Crashing", "checkpoint.every_steps=10"]
    done = run("fit", tmp_path / "run", *task, expect=70)
    assert "Traceback (most recent call last)" in done.stderr
    assert "tasks.py" in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyError: 'no such thing'"
    assert "no such thing" in (tmp_path / "run/logs/rank-0.log").read_text()
    run("fit", tmp_path / "run", *task)
    run("fit", tmp_path / "straight", "checkpoint.every_steps=10")
    assert_same_bits(tensors(tmp_path / "run"), tensors(tmp_path / "straight"))


def test_a_task_from_any_directory(tmp_path):
    """By dotted path from the working directory, without further environment variables."""
    (tmp_path / "mine").mkdir()
    source = (ROOT / "tests/support/tiny.py").read_text()
    (tmp_path / "mine/task.py").write_text(source)
    words = ["task.use=mine.task:TinyTask", "run.dir=out", *TINY[1:]]
    started = quick([sys.executable, "-m", "train", "fit", *words])
    started["env"].pop("PYTHONPATH", None)
    done = subprocess.run(**started, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run("fit", tmp_path / "here")
    assert_same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "here"))
    done = run("fit", tmp_path / "x", "task.use=mine.task:TinyTask", expect=64)
    assert f"neither installed nor in the working directory {os.fspath(ROOT)}" in only_line(done)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.use=.tiny:TinyTask"], "must have the form module.path:Class"),
        (["length.steps=null", "length.epochs=.inf"], "length.epochs must be"),
        (["optim.lr=.inf"], "optim.lr must be"),
        (
            ["checkpoint.keep_best.metric=acuracy", "checkpoint.keep_best.mode=max"],
            "checkpoint.keep_best.metric is 'acuracy', but the task's evaluation reports only loss",
        ),
    ],
)
def test_invalid_values_that_need_the_task(tmp_path, overrides, expected):
    assert expected in only_line(run("fit", tmp_path, *overrides, expect=64))


@pytest.mark.parametrize("key", ["evaluate.every_epochs=0.5", "evaluate.at_start=true"])
def test_every_evaluation_rule_needs_data(tmp_path, key):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:WithoutEvaluation", key, expect=65)
    assert f"but {key.partition('=')[0]} asks for evaluation" in only_line(done)
