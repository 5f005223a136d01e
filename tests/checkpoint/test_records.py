"""JSON records of a run directory that have another form than they should."""

import json

import pytest

from train.checkpoint.loop_state import state_fault
from train.checkpoint.opening import _newest_row
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.run_view import Run
from train.exits import ResumeRefusedError, UsageError

IDENTITY = {"id": "a-1", "name": "a", "wandb_id": "a-1", "created": 1.5}
DEEP = "[" * 100_000


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


def refused(call):
    with pytest.raises(ResumeRefusedError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    "changes",
    [
        {"id": 3},
        {"id": ""},
        {"id": "../a"},
        {"id": "a\nb"},
        {"id": "\x1b[2J"},
        {"id": None},
        {"id": ["a"]},
        {"name": 3},
        {"wandb_id": "a/b"},
        {"created": "now"},
        {"created": True},
        {"more": 1},
    ],
)
def test_an_identity_of_another_form_is_refused(directory, changes):
    directory.identity_path.write_text(json.dumps(IDENTITY | changes))
    assert "run.json is damaged (its " in refused(lambda: directory.identity(""))


@pytest.mark.parametrize("missing", list(IDENTITY))
def test_an_identity_without_a_field_is_refused(directory, missing):
    values = {name: value for name, value in IDENTITY.items() if name != missing}
    directory.identity_path.write_text(json.dumps(values))
    assert f"it has no {missing}" in refused(lambda: directory.identity(""))


@pytest.mark.parametrize("variable", ["ISORUN_RUN_ID", "WANDB_RUN_ID"])
def test_an_id_that_could_not_be_read_again_is_not_given(directory, monkeypatch, variable):
    monkeypatch.setenv(variable, "a/../b")
    with pytest.raises(UsageError, match=variable):
        directory.identity("x")
    assert not directory.exists


@pytest.mark.parametrize(
    "text", ['{"step": "x"}', '{"step": true}', '{"step": -1}', '{"step": 1e3}', "{}", "[]", DEEP]
)
def test_a_finish_of_another_form_is_refused(directory, text):
    directory.finished_path.write_text(text)
    assert "finished.json is damaged (" in refused(directory.finished)


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"launch": 3, "restarts": 1}', '{"launch": "x", "restarts": "1"}', DEEP]
)
def test_a_stop_of_another_form_is_refused(directory, monkeypatch, text):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    (directory.path / "stopped.json").write_text(text)
    assert "stopped.json is damaged (" in refused(directory.refuse_restart_after_stop)


STATE = {
    "run": "a", "attempt": 1, "samples": 10, "seed": 0, "batch": 2,
    "progress": {
        "step": 3, "position": 6, "skipped_steps": 0, "skipped_in_a_row": 0,
        "evaluated": {"loss": 1.0}, "evaluated_step": None, "evaluation_due": False,
    },
    "window": {"loss_sum": 0.5, "count": 2, "norm": None},
    "early_stop": {"best": None, "waited": 0, "stopped": False},
    "loss_scale": {"value": 1.0, "steps_since": 0},
    "optimizer": {}, "optimizer_groups": [{"lr": 1}], "extra_state": {},
    "optim": {"use": "adamw", "options": {}},
}  # fmt: skip


def places(values, prefix=()):
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def test_the_state_of_a_run_is_accepted():
    assert state_fault(STATE) is None
    former = {key: STATE[key] for key in ("samples", "progress", "window", "optimizer")}
    assert state_fault(former) is None


@pytest.mark.parametrize(
    ("part", "key"), [("window", "loss_sum"), ("early_stop", "best"), ("loss_scale", "value")]
)
def test_a_number_that_no_float_holds_is_named(part, key):
    state = STATE | {part: STATE[part] | {key: 10**400}}
    assert state_fault(state) == f"{part}.{key} a number that is too large"


def test_rows_with_numbers_that_no_array_holds_are_left_out(directory):
    directory.identity_path.write_text(json.dumps(IDENTITY))
    rows = [
        {"step": 1, "loss": 10**400, "time": 1.0}, {"step": 10**30, "loss": 2.0},
        {"step": -1, "loss": 2.0}, {"step": True, "loss": 2.0}, {"step": 2, "loss": 3},
        {"step": 3, "loss": None}, {"step": 4, "loss": "low"},
    ]  # fmt: skip
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = Run(directory.path).metrics
    assert metrics["loss"].steps.tolist() == [2, 3]
    assert metrics["time"].values.tolist() == [1.0]


@pytest.mark.parametrize("more", [b"", b"\n", b"x" * 100, b"\0" * 100_000])
def test_the_newest_row_is_found_without_the_rest_of_the_file(directory, monkeypatch, more):
    monkeypatch.setattr("train.files._BLOCK", 64)
    rows = [{"step": step, "train/epoch": step / 10} for step in range(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    directory.metrics.write_bytes(text.encode() + more)
    assert _newest_row(directory.metrics, 50) == rows[50]
    assert _newest_row(directory.metrics, 1000) == rows[99]
    assert _newest_row(directory.metrics, -1) is None


TEXTS = (("run",), ("optim", "use"))


@pytest.mark.parametrize("place", list(places(STATE)), ids=".".join)
@pytest.mark.parametrize("wrong", ["x", [3]], ids=["text", "list"])
def test_a_state_with_a_value_of_another_type_is_named(place, wrong):
    value = 3 if wrong == "x" and place in TEXTS else wrong
    state = json.loads(json.dumps(STATE))
    part = state
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    fault = state_fault(state)
    assert fault is not None
    assert place[-1] in fault


@pytest.mark.parametrize("name", ["samples", "progress", "window", "optimizer"])
def test_a_state_without_a_required_value_is_named(name):
    assert name in state_fault({key: value for key, value in STATE.items() if key != name})
