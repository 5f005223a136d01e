"""``parity``: two tasks on every placement, and detection of a difference."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

import train
from tests.support.forked import quick
from tests.support.runs import ROOT, TINY, curve, environment, is_running
from tests.support.runs import command as command_of
from train.cli import main
from train.commands.placements import error_in
from train.parity.compare import Tolerance, compare, largest_difference

ALL = ["1", "2:ddp", "3:ddp", "4:ddp", "2:fsdp2", "2:zero1", "2:zero2", "2:zero3"]
# Small, and with targets of variable length: documents end within samples.
TEXT = [
    "model.layers=2",
    "model.heads=2",
    "model.width=32",
    "data.context=64",
    "task.sample_tokens=8",
    "evaluate.micro_batch_size=64",
]


def parity(*words, expect=0, cwd=ROOT):
    done = subprocess.run(
        **quick([sys.executable, "-m", "train", "parity", *map(str, words)]),
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def rows(done, placements=ALL[1:]):
    found = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].isdigit()}
    return {name: found[name] for name in placements}


RUNS = {
    "text": ["configs/text.yaml", *TEXT, "batch.global_batch_size=24", "optim.lr=1e-3"],
    "digits": ["configs/digits.yaml", "batch.global_batch_size=48"],
}


@pytest.mark.parametrize(
    ("task", "placements"),
    [
        pytest.param("digits", ALL, marks=pytest.mark.slow),
        pytest.param("text", ALL, marks=pytest.mark.slow),
    ],
    ids=["digits on all", "text on all"],
)
def test_every_placement_gives_the_same_run(tmp_path, task, placements):
    config, *overrides = RUNS[task]
    done = parity("--config", config, "--steps", 20, "--out", tmp_path, *placements, *overrides)
    for row in rows(done, placements[1:]).values():
        assert row.endswith("same")
        assert not row.endswith("NOT the same")
        assert row.count("identical") == 2
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_are_bitwise_equal_to_one(tmp_path):
    """The sum of two values does not depend on their order."""
    names = ["2:ddp", "2:fsdp2", "2:zero1", "2:zero2"]
    tiny = ["task.use=tests.support.tiny:TinyTask", "batch.global_batch_size=12", "length.steps=9"]
    done = parity("--out", tmp_path, "1", *names, *tiny, "optim.clip_norm=1.0")
    found = {
        name: [float(word) for word in row.split()[1:4]] for name, row in rows(done, names).items()
    }
    assert found["2:ddp"] == found["2:fsdp2"] == [0, 0, 0]
    # ZeRO shards at other offsets, where the optimiser's vectorised kernel rounds differently.
    assert max(found["2:zero1"] + found["2:zero2"]) < 1e-7


@pytest.mark.slow
def test_another_seed_is_not_the_same_run(tmp_path):
    """Compares the reference run with a run that has another seed."""
    tiny = ["task.use=tests.support.tiny:TinyTask", "batch.global_batch_size=12", "length.steps=9"]
    done = parity("--steps", 10, "--out", tmp_path, "1", "2", *tiny, "batch.micro_batch_size=6")
    assert rows(done, ["2"])["2"].endswith("same")
    settings = ["track.log_every_steps=1", "length.steps=10", "run.seed=1"]
    other = command_of("fit", tmp_path / "other", *settings, base=tiny)
    subprocess.run(**quick(other), cwd=ROOT, check=True, capture_output=True)
    found = compare(tmp_path / "1", tmp_path / "other")
    assert found.loss > 1e-3
    assert found.norm > 1e-3
    assert found.weights > 1e-3
    assert re.fullmatch(r"\d\.\w+ \(\d\.\de[+-]\d\d\)", found.tensor), found.tensor
    assert not found.same_ledger
    assert not found.within(Tolerance(1.0, 1.0, 1.0, 1.0))


def rewritten(source, target, change):
    """A copy of a run whose rows of metrics.jsonl with an evaluation were changed."""
    shutil.copytree(source, target)
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "eval/loss" in row:
            change(row)
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_metrics_of_the_evaluation_are_compared(tmp_path):
    one = tmp_path / "one"
    train.fit(*TINY, "track.log_every_steps=1", "length.steps=6", f"run.dir={one}")
    assert curve(one, "eval/loss").keys() == {6}
    assert compare(one, one).within(Tolerance(0.0, 0.0, 0.0, 0.0))
    assert compare(one, one).tensor == ""

    def compared(name, change):
        found = compare(one, rewritten(one, tmp_path / name, change))
        assert found.loss == found.norm == found.weights == 0.0
        assert not found.within(Tolerance())
        return found.evaluation

    def scale(row):
        row["eval/loss"] *= 1.01

    assert compared("another value", scale) == pytest.approx(0.01)
    assert math.isnan(compared("another name", lambda row: row.update({"eval/more": 1.0})))
    assert math.isnan(compared("not finite", lambda row: row.update({"eval/loss": None})))


def test_a_metric_near_zero_may_be_a_rounding_error():
    assert largest_difference({1: 0.0}, {1: 1e-8}, near_zero=1e-3) == pytest.approx(1e-5)
    assert largest_difference({1: 5.0}, {1: 6.0}, near_zero=1e-3) == pytest.approx(0.2)


def test_curves_that_cannot_be_compared_differ():
    assert largest_difference({1: 1.0}, {1: 1.0, 2: 1.0}) != largest_difference({1: 1.0}, {1: 1.0})
    assert largest_difference({1: float("nan")}, {1: float("nan")}) == 0.0
    assert not largest_difference({1: float("nan"), 2: 1.0}, {1: 1.0, 2: 1.0}) <= 1e9
    assert largest_difference({1: 2.0, 2: -4.0}, {1: 2.0, 2: -5.0}) == 0.25


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["2:fdsp2"], "'2:fdsp2' is not a placement"),
        (["0", "2"], "'0' is not a placement"),
        (["1"], "needs at least two different placements"),
        (["1", "1"], "needs at least two different placements"),
        (["1", "2", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_bad_placements(tmp_path, words, expected):
    done = parity("--config", "configs/digits.yaml", "--out", tmp_path, *words, expect=64)
    assert expected in done.stderr


def test_a_failed_run_is_reported(tmp_path):
    task = ["task.use=tests.support.tiny:TinyTask", "batch.global_batch_size=12", "data.fail_at=3"]
    done = parity("--steps", 20, "--out", tmp_path, "1", "2", *task, "length.steps=9", expect=65)
    assert "The run on 1 ended with exit code 65: The dataset Noisy failed at" in done.stderr
    assert str(tmp_path / "1.log") in done.stderr


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs parity on two placements with one process each, in the process of the test."""

    def start(files, settings, placement, directory):
        train.fit(*settings, f"run.dir={directory}", f"strategy={placement.strategy}")
        return f"warning: both\nwarning: twice\nwarning: twice\nwarning: of {placement}\n"

    monkeypatch.setattr("train.commands.parity._start", start)
    return lambda out, *words: main(["parity", "--out", str(out), "1", "1:ddp", *TINY, *words])


class Failing(train.Hook):
    def __init__(self):
        raise AssertionError("parity made a hook of the config")


@pytest.mark.slow
def test_mirror_and_hooks_of_the_config_are_not_used(tmp_path, in_this_process):
    mirror = [f"checkpoint.mirror.url={(tmp_path / 'mirror').as_uri()}", "length.steps=6"]
    train.fit(*TINY, *mirror, f"run.dir={tmp_path / 'run'}")
    files = [path for path in (tmp_path / "mirror").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert before
    hook = "hooks=[tests.commands.test_parity:Failing]"
    assert in_this_process(tmp_path / "out", "--steps", "6", *mirror, hook) == 0
    for name in ("1", "1-ddp"):
        assert train.Run(tmp_path / "out" / name).attempts[0]["resumed_from_step"] is None
        assert len(curve(tmp_path / "out" / name)) == 6
    assert {path: path.read_bytes() for path in files} == before


@pytest.mark.slow
def test_a_repeated_comparison_computes_again(tmp_path, in_this_process):
    assert in_this_process(tmp_path, "--steps", "4") == 0
    assert in_this_process(tmp_path, "--steps", "5", "run.seed=1") == 0
    assert [len(curve(tmp_path / name)) for name in ("1", "1-ddp")] == [5, 5]


def test_a_directory_of_another_origin_is_not_removed(tmp_path, in_this_process, capsys):
    (tmp_path / "1-ddp").mkdir()
    (tmp_path / "1-ddp" / "mine").touch()
    assert in_this_process(tmp_path) == 64
    assert "1-ddp exists, but parity has not made it" in capsys.readouterr().err
    assert (tmp_path / "1-ddp" / "mine").exists()


@pytest.mark.slow
def test_few_steps_shorten_warmup_and_decay(tmp_path, in_this_process, capsys):
    schedule = ["schedule.use=wsd", "schedule.decay_steps=5"]
    assert in_this_process(tmp_path, "--steps", "3", *schedule) == 0
    said = capsys.readouterr()
    repeated = [line for line in (said.out + said.err).splitlines() if "warning (" in line]
    assert repeated == [
        "warning (1, 1:ddp): both",
        "warning (1, 1:ddp): twice",
        "warning (1): of 1",
        "warning (1:ddp): of 1:ddp",
    ], "each warning of a run once, with the placements"


def test_the_whole_error_of_a_run_is_quoted_once():
    lines = ["These differ:", "  optim.lr: 1 -> 2", "Undo them."]
    log = "".join(f"isorun: error: {line}\n" for line in lines)
    assert error_in(f"Run x starts\n{log}{log}") == "These differ: optim.lr: 1 -> 2 Undo them."
    assert error_in("Run x starts\n") == ""


@pytest.mark.slow
def test_a_stop_signal_stops_the_processes_of_a_placement(tmp_path):
    words = [*TINY, "length.steps=400", "task.sleep=0.02", "2:ddp", "1", "--steps=400"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "parity", *words, "--out", str(out)],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    rows = out / "2-ddp" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3, "torchrun and two ranks"
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Stopped on request (SIGUSR1)" in err
    assert not any(is_running(each.pid) for each in started)
