"""``compare`` says what differs between runs, and from which step on their losses do."""

import json
import shutil

import numpy as np
import pytest

from tests.support.run_files import make_run, write_checkpoint
from tests.support.runs import ROOT
from train.checkpoint.run_view import Series
from train.cli import main
from train.code.changes import Changes, FileChange, write
from train.runs.curves import common_steps, compare_losses
from train.runs.differences import config_rows

LOSSES = {step: 5 / step for step in range(1, 21)}


def compared(capsys, *words):
    assert main(["compare", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def said(capsys, *words):
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def fingerprint(value=0.5, kind="(8,) torch.float32"):
    return {"samples": 103, "data": [["sample 0['x']", kind, [value, None]]]}


def test_the_same_config_on_other_placements(tmp_path, capsys):
    one = make_run(tmp_path / "one", rows=LOSSES, checkpoint=fingerprint(), name="same")
    close = {step: loss * (1 + 1e-7) for step, loss in LOSSES.items()}
    elsewhere = {"world_size": 2, "hosts": ["a", "b"], "strategy": "fsdp2"}
    two = make_run(
        tmp_path / "two", "strategy=fsdp2", rows=close, name="same",
        checkpoint=fingerprint(0.5001), attempts=[elsewhere],
    )  # fmt: skip
    found = compared(capsys, one, two)
    assert found["config"] == {"semantic": {}, "non_semantic": {"strategy": ["auto", "fsdp2"]}}
    assert (found["code"], found["data"], found["data_fingerprints"]) == ({}, {}, True)
    assert found["environment"] == {
        "nodes": [1, 2],
        "world_size": [1, 2],
        "hosts": [["node-0"], ["a", "b"]],
        "strategy": ["single", "fsdp2"],
    }
    assert found["losses"]["first_difference"] is None
    assert found["losses"]["steps"] == 20
    text = said(capsys, one, two)
    assert "config: no semantic difference\n" in text
    assert "\ncode: the same\ndata: the same\n" in text
    assert (
        "losses: equal at 20 common logged steps within a relative 1e-05 (largest difference 1.0e-07"
        in text
    )


def test_differences_that_change_results(tmp_path, capsys):
    one = make_run(tmp_path / "one", "optim.lr=0.02", rows=LOSSES)
    other = {**LOSSES, 7: 9.0, 8: 30.0}
    code = {"code": {"isorun": "0.2.0", "commit": "def", "dirty": False}}
    two = make_run(tmp_path / "two", rows=other, attempts=[{**code, "samples": 99}])
    found = compared(capsys, one, two)
    assert found["config"]["semantic"] == {"optim.lr": [0.02, 0.01]}
    assert found["code"] == {"commit": ["abc", "def"]}
    assert found["data"] == {"samples": [103, 99]}
    assert found["data_fingerprints"] is False
    assert found["losses"]["first_difference"] == 7
    assert found["losses"]["values"] == [5 / 7, 9.0]
    assert found["losses"]["largest_step"] == 8
    text = said(capsys, one, two)
    assert "losses: differ by more than a relative 1e-05 from step 7 on (A 0.7142857, B 9)" in text
    tolerant = compared(capsys, one, two, "--tolerance", "100")
    assert tolerant["losses"]["first_difference"] is None


def test_a_section_that_one_run_does_not_have_is_one_difference(tmp_path, capsys):
    stop = "early_stop={metric: loss, patience: 2}"
    runs = [
        make_run(tmp_path / name, *overrides, name="same")
        for name, overrides in (("a", [stop]), ("b", []), ("c", [stop.replace("2", "4")]))
    ]
    (key, values), *others = compared(capsys, *runs)["config"]["semantic"].items()
    assert (key, others) == ("early_stop", [])
    assert [value and value["patience"] for value in values] == [2, None, 4]


def test_a_field_that_an_older_version_did_not_store_has_its_default():
    config = {"optim": {"lr": 0.01}, "schedule": {"use": "cosine"}}
    newer = {"optim": {"lr": 0.01, "max_skipped_steps": 10}, "schedule": {"use": "constant"}}
    found = config_rows([config, newer])
    assert (found.semantic, found.non_semantic) == ({"schedule.use": ["cosine", "constant"]}, {})


def test_keys_of_a_built_in_task_count_as_its_class_says():
    from train.tasks.registry import BUILT_IN, find_task

    for name in BUILT_IN:
        data = find_task(name, "test").Data
        for key, field in data.model_fields.items():
            if field.json_schema_extra:  # does not change results
                rows = config_rows([{"task": {"use": name}, "data": {key: v}} for v in ("x", "y")])
                assert rows.semantic == {}
                assert rows.non_semantic == {f"data.{key}": ["x", "y"]}
    own = [{"task": {"use": "nowhere:Task"}, "data": {"path": value}} for value in "xy"]
    assert list(config_rows(own).semantic) == ["data.path"]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (fingerprint(kind="(9,) torch.float32"), "fingerprint"),
        (fingerprint(0.9), "first values of sample 0['x']"),
        ({"samples": 103, "data": []}, "fingerprint"),
        ({"samples": 50}, "samples"),
    ],
)
def test_other_data(tmp_path, capsys, other, name):
    one = make_run(tmp_path / "one", checkpoint=fingerprint())
    two = make_run(tmp_path / "two", checkpoint=other)
    assert name in compared(capsys, one, two)["data"]


def test_the_newest_checkpoint_that_can_be_read_tells_of_the_data(tmp_path, capsys):
    one = make_run(tmp_path / "one", checkpoint=fingerprint())
    two = make_run(tmp_path / "two", checkpoint=fingerprint())
    write_checkpoint(two, {"samples": 5}, step=20)
    assert compared(capsys, one, two)["data"]["samples"] == [103, 5]
    (two / "checkpoints/step-000000000020/manifest.json").write_text("{}")
    assert compared(capsys, one, two)["data"] == {}


def test_metrics_side_by_side(tmp_path, capsys):
    rows = [
        {"step": step, "eval/loss": abs(step - 2) + 1.0, "eval/f1": step / 10} for step in (1, 2, 3)
    ]
    one = make_run(tmp_path / "one", rows=rows)
    two = make_run(tmp_path / "two", rows=rows[:2])
    found = compared(capsys, one, two)["metrics"]
    assert found["eval/loss"] == {
        "final": [{"step": 3, "value": 2.0}, {"step": 2, "value": 1.0}],
        "best": [{"step": 2, "value": 1.0}] * 2,
        "common_step": 2,
        "common": [1.0, 1.0],
    }
    assert found["eval/f1"]["best"] == [None, None]  # less may be better, or more
    text = said(capsys, one, two)
    assert [line.split() for line in text.splitlines() if "at step 2" in line] == [
        ["at", "step", "2", "1", "1"],
        ["at", "step", "2", "0.2", "0.2"],
    ]


def series(values):
    return Series(np.array([*values], np.int64), np.array([*values.values()], np.float64))


def test_losses_of_other_steps_are_not_compared():
    """A loss is the mean of the steps since the one logged before."""
    each = series({1: 1.0, 2: 2.0, 5: 5.0, 6: 6.0})
    fifth = series({1: 1.0, 5: 4.0, 6: 6.0})
    assert common_steps([each, fifth], windows=True).tolist() == [1, 6]
    assert common_steps([each, fifth], windows=False).tolist() == [1, 5, 6]
    assert compare_losses([each, fifth], 0.0).first is None


@pytest.mark.parametrize(
    ("one", "other", "first"),
    [
        (float("nan"), float("nan"), None),
        (1.0, float("nan"), 1),
        (float("nan"), 1.0, 1),
        (0.0, 0.0, None),
        (0.0, 1e-20, 1),
        (-1.0, -1.0 - 1e-7, None),
    ],
)
def test_a_loss_that_is_not_finite_differs_from_a_finite_one(one, other, first):
    assert compare_losses([series({1: one}), series({1: other})], 1e-5).first == first


def test_steps_out_of_order_in_a_damaged_file_count_once(tmp_path, capsys):
    """The last row of a step counts."""
    rows = [
        {"step": step, "train/loss": loss}
        for step, loss in ((1, 9.0), (3, 8.0), (2, 7.0), (3, 6.0))
    ]
    one = make_run(tmp_path / "one", rows=rows)
    two = make_run(tmp_path / "two", rows={1: 9.0, 2: 7.0, 3: 5.0})
    found = compared(capsys, one, two)
    loss = found["metrics"]["train/loss"]
    assert loss["final"] == loss["best"] == [{"step": 3, "value": 6.0}, {"step": 3, "value": 5.0}]
    assert (found["losses"]["steps"], found["losses"]["first_difference"]) == (3, 3)


def test_runs_without_a_step_in_common(tmp_path, capsys):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", rows={1: 1.0})
    assert "losses: not comparable" in said(capsys, one, two)
    assert compared(capsys, one, two)["losses"]["steps"] == 0


def test_runs_of_version_0_1_0(capsys):
    data = ROOT / "tests/data/run-0.1.0"
    found = compared(capsys, data / "single", data / "two-ranks")
    assert found["config"]["semantic"] == {"ema": [{"decay": 0.9}, None]}
    assert found["environment"]["strategy"] == ["single", "fsdp2"]
    assert found["losses"]["first_difference"] == 1
    assert [run["state"] for run in found["runs"]] == ["stopped", "stopped"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 64, "compare needs at least two run directories, but got 0"),
        (["one"], 64, "compare needs at least two run directories, but got 1"),
        (["one", "nowhere"], 64, "There is no run in nowhere"),
        (
            ["one", "one", "--tolerance", "-1"],
            64,
            "--tolerance must be a number that is not negative",
        ),
        (["one", "one", "--tolerance", "nan"], 64, "--tolerance must be a number"),
        (["one", "damaged"], 76, "run.json is damaged"),
        (["one", "wrong"], 76, "wrong cannot be compared (metrics.jsonl: it is a symbolic link"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "damaged")
    (tmp_path / "damaged/run.json").write_text("[]")
    shutil.copytree(tmp_path / "one", tmp_path / "wrong")
    (tmp_path / "wrong/metrics.jsonl").symlink_to("/dev/null")
    assert main(["compare", *words]) == code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert message in line
    assert printed.out == ""


def with_changes(run, *files, notes=()):
    changes = Changes([FileChange(path, text) for path, text in files], list(notes))
    write(changes, run, 1)
    return run


def a_change(path, value):
    head = f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n"
    return path, f"{head}@@ -1 +1 @@\n-layers = 2\n+layers = {value}\n"


def test_changes_of_the_code_are_compared_by_file(tmp_path, capsys):
    same = a_change("same.py", 3)
    one = with_changes(make_run(tmp_path / "one"), same, a_change("model.py", 3))
    note = "Left out: .env (its name is that of a secret)."
    two = with_changes(make_run(tmp_path / "two"), same, a_change("model.py", 4), notes=[note])
    code = compared(capsys, one, two)["code"]
    assert list(code) == ["changes in model.py", "left out"]
    first, second = code["changes in model.py"]
    assert first[:6] == second[:6] == "+1 -1 "
    assert first != second
    assert code["left out"] == [None, [note]]
    clean = make_run(tmp_path / "three")
    assert compared(capsys, one, clean)["code"]["changes in same.py"][1] is None


def test_images_and_versions_are_compared(tmp_path, capsys):
    runs = [
        make_run(tmp_path / name, attempts=[{"image": f"x@{name}", "environment": {"torch": name}}])
        for name in ("one", "two")
    ]
    found = compared(capsys, *runs)["environment"]
    assert found == {"image": ["x@one", "x@two"], "environment.torch": ["one", "two"]}
