"""``runs`` lists runs: which it finds, what it says of them, their order and filters."""

import json
import os
import re

import pytest

from tests.support.run_files import make_run
from tests.support.runs import ROOT
from train.cli import main
from train.runs.columns import COLUMNS
from train.runs.state import STATES
from train.runs.table import drawn

STOPPED = {"ended": {"time": 1e9 + 90, "code": 143, "reason": "stopped at step 3"}}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(
        tmp_path / "runs/first", "optim.lr=0.02", attempts=[STOPPED],
        rows=[{"step": 1, "train/loss": 3.0}, {"step": 2, "eval/loss": 2.5}, {"step": 3, "eval/loss": 2.75}],
    )  # fmt: skip
    make_run(
        tmp_path / "runs/sweep/second", "strategy=fsdp2", finished=40,
        attempts=[{}, {"world_size": 4, "hosts": ["a", "b"], "strategy": "fsdp2", "time": 1e9 + 500}],
        rows={40: 0.5},
    )  # fmt: skip
    return tmp_path / "runs"


def listed(capsys, *words):
    """The JSON of the command by the name of the run."""
    assert main(["runs", "--json", *words]) == 0
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)}


def table(capsys, *words):
    assert main(["runs", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words):
    assert main(["runs", *map(str, words)]) == 64
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    return line


def test_the_table(runs, capsys):
    header, first, second = table(capsys)
    assert header.split() == list(COLUMNS)
    assert first.split()[:-2] == [
        "runs/first", "stopped", "3/40", "loss", "2.5", "@2", "loss", "2.75", "@3", "single", "x1",
        "1", "-", "143", "PREEMPTED",
    ]  # fmt: skip
    assert "fsdp2 x4 on 2 nodes" in second
    assert second.split()[:3] == ["runs/sweep/second", "finished", "40/40"]
    assert "train/loss 0.5 @40" in second


def test_the_json(runs, capsys):
    found = listed(capsys)
    assert list(found) == ["first", "second"]
    age = found["first"].pop("age")
    assert age > 0
    assert found["first"] == {
        "path": "runs/first",
        "id": "first-id",
        "name": "first",
        "task": "tests.support.tiny:TinyTask",
        "state": "stopped",
        "why": None,
        "step": 3,
        "total_steps": 40,
        "best": {"metric": "eval/loss", "value": 2.5, "step": 2, "of_all": True},
        "last": {"metric": "eval/loss", "value": 2.75, "step": 3},
        "placement": {"strategy": "single", "ranks": 1, "nodes": 1, "device": "cpu"},
        "attempts": 1,
        "goodput": None,
        "exit": {
            "code": 143,
            "name": "PREEMPTED",
            "reason": "stopped at step 3",
            "time": 1e9 + 90,
        },
        "created": 1e9,
        "last_sign": 1e9 + 90,
    }


@pytest.mark.parametrize(
    ("override", "metric", "best"),
    [
        ("checkpoint.keep_best={metric: accuracy, mode: max}", "eval/accuracy", 0.9),
        ("early_stop={metric: accuracy, mode: min}", "eval/accuracy", 0.1),
        ("optim.lr=1", "eval/loss", 3.0),
    ],
)
def test_best_is_by_the_metric_that_the_config_names(tmp_path, capsys, override, metric, best):
    values = [{"eval/accuracy": 0.1, "eval/loss": 4.0}, {"eval/accuracy": 0.9, "eval/loss": 3.0}]
    rows = [{"step": step, **row} for step, row in enumerate(values, 1)]
    make_run(tmp_path / "run", override, rows=rows)
    found = listed(capsys, str(tmp_path))["run"]
    assert (found["best"]["metric"], found["best"]["value"]) == (metric, best)


def test_the_length_in_epochs_is_shown_in_steps(tmp_path, capsys):
    make_run(tmp_path / "run", "length.steps=null", "length.epochs=2")
    assert listed(capsys, str(tmp_path))["run"]["total_steps"] == 18  # 206 samples in batches of 12


@pytest.mark.parametrize(
    ("by", "order"),
    [
        (["--sort", "step"], ["first", "second"]),
        (["--sort", "-step"], ["second", "first"]),
        (["--sort=-step"], ["second", "first"]),
        (["--sort", "age"], ["second", "first"]),
        (["--sort", "placement"], ["first", "second"]),
        (["--sort", "exit"], ["first", "second"]),  # unknown ones are last in both directions
        (["--sort", "-exit"], ["first", "second"]),
    ],
)
def test_order(runs, capsys, by, order):
    assert list(listed(capsys, *by)) == order


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts(runs, capsys, column):
    assert len(listed(capsys, f"--sort={column}")) == 2


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--state", "finished"], ["second"]),
        (["--state", "finished", "--state", "stopped"], ["first", "second"]),
        (["--where", "optim.lr=2e-2"], ["first"]),
        (["optim.lr=0.02"], ["first"]),
        (["runs/sweep", "optim.lr=1e-2"], ["second"]),
        (["optim.lr=0.02", "strategy=fsdp2"], []),
        (["strategy=auto", "ema=null"], ["first"]),
        (["track.tensorboard=false"], ["first", "second"]),
        (["track.tensorboard=0"], []),
        (["--task", "TinyTask"], ["first", "second"]),
        (["--task", "tests.support.tiny:TinyTask"], ["first", "second"]),
        (["--task", "text"], []),
    ],
)
def test_filters(runs, capsys, words, names):
    assert list(listed(capsys, *words)) == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sort", "stp"], "did you mean step?"),
        (["--sort"], "--sort is ''"),
        (["--state", "finshed"], "did you mean finished?"),
        (["optim.lrr=1"], "No run has the config key optim.lrr; did you mean optim.lr?"),
        (["--where", "lr"], "--where is 'lr', which is not of the form key=value."),
        (["optim.lr=["], "cannot be read as YAML"),
        (["nowhere"], "nowhere does not exist"),
        (["runs/first/run.json"], "runs/first/run.json is not a directory"),
    ],
)
def test_wrong_arguments(runs, capsys, words, said):
    assert said in refused(capsys, *words)


def test_without_a_directory_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "The working directory has no directory runs" in refused(capsys)
    assert table(capsys, ".") == ["There is no run in .."]
    assert listed(capsys, ".") == {}


def test_which_directories_are_searched(tmp_path, capsys):
    make_run(tmp_path / "a/b/c/run")
    make_run(tmp_path / "a/b/c/run/exports/inside")
    make_run(tmp_path / ".hidden/secret")
    make_run(tmp_path / "1/2/3/4/5/6/deepest")
    make_run(tmp_path / "other/linked")
    os.symlink(tmp_path / "other", tmp_path / "a/link")
    assert sorted(listed(capsys, str(tmp_path / "a"), str(tmp_path / "a/b"))) == ["run"]
    assert sorted(listed(capsys, str(tmp_path / "a/link"))) == ["linked"]
    assert sorted(listed(capsys, str(tmp_path))) == ["linked", "run"]
    assert sorted(listed(capsys, str(tmp_path / "1"))) == ["deepest"]


def damage_identity(run):
    (run / "run.json").write_text("{}")


def lose_identity(run):
    (run / "run.json").unlink()


def foreign(run):
    (run / "run.json").write_text('{"name": "of another program"}')


def cut_config(run):
    (run / "config.json").write_text('{"run": ')


def link_metrics(run):
    (run / "metrics.jsonl").symlink_to("/dev/zero")


def directory_of_attempts(run):
    (run / "attempts.jsonl").unlink()
    (run / "attempts.jsonl").mkdir()


@pytest.mark.parametrize(
    "damage",
    [damage_identity, lose_identity, foreign, cut_config, link_metrics, directory_of_attempts],
)
def test_a_damaged_directory_is_a_row_that_says_why(runs, capsys, damage):
    damage(make_run(runs / "broken"))
    found = {run["path"]: run for run in listed(capsys).values()}
    assert len(found) == 3
    assert found["runs/broken"]["state"] == "unreadable"
    assert found["runs/broken"]["why"]
    lines = table(capsys, "--state", "unreadable")
    assert lines[1].split()[:2] == ["runs/broken", "unreadable"]
    assert lines[2].startswith("runs/broken: ")


def test_the_page_lists_the_states_columns_and_keys(runs, capsys):
    page = (ROOT / "docs/runs.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert [name for name in rows if name in STATES] == list(STATES)
    assert all(rows[name].startswith(text) for name, text in STATES.items())
    assert [name for name in rows if name in COLUMNS][: len(COLUMNS)] == list(COLUMNS)
    section = page.partition("### JSON")[2].partition("## compare")[0]
    first = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    named = [key for cell in first for key in re.findall(r"`(\w+)`", cell)]
    assert named == list(listed(capsys)["first"])


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    make_run(tmp_path / "a\x1b[31m\nb", name="run")
    make_run(tmp_path / os.fsdecode(b"\xff"), name="run2")
    said = "\n".join(table(capsys, tmp_path))
    assert "\x1b" not in said
    assert "a\\x1b[31m b" in said
    assert "\\udcff" in said


def test_a_narrow_terminal_has_fewer_columns(runs, capsys, monkeypatch):
    monkeypatch.setattr("train.commands.runs.terminal_width", lambda: 80)
    lines = table(capsys)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["run", "state", "step", "best", "exit", "age"]
    assert "loss 2.5 @2" in lines[1]
    monkeypatch.setattr("train.commands.runs.terminal_width", lambda: 300)
    assert table(capsys)[0].split() == list(COLUMNS)


def test_a_table_fits_the_terminal_and_is_whole_elsewhere():
    rows = [["run", "state"], ["runs/" + "long" * 20 + "/end", "stopped"], ["日本語のラン", "dead"]]
    whole = drawn(rows, None)
    assert rows[1][0] in whole[1]
    fitted = drawn(rows, 40)
    assert max(map(len, fitted)) == 40
    assert fitted[1].startswith("runs/long")
    assert "…" in fitted[1]
    assert fitted[1].endswith("/end  stopped")
    assert fitted[2].index("dead") == fitted[0].index("state") - 6  # each of 6 signs is 2 wide
