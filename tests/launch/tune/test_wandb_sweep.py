"""Studies whose values W&B's server chooses (tune --wandb)."""

import json
import os
import signal

import pytest

pytest.importorskip("wandb")

from launch.tune.methods import check_method, wandb_method
from launch.tune.settings import Settings, parse_objectives
from launch.tune.sweep_config import given_values, sweep_config
from tests.launch.tune.test_study import checked
from tests.launch.tune.tuning import BASE, refused, run, shown, start, start_real, starts, wait_for
from tests.support.lanes import slow
from tests.support.wandb_server import WandbServer
from train.exits import UsageError

LR = "optim.lr: {type: float, low: 1.0e-2, high: 1.0, log: true}\n"
SPACE = """\
optim.lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
optim.weight_decay: {type: float, low: 0.0, high: 0.5}
model.dropout: {type: float, low: 0.1, high: 0.4, step: 0.15}
model.channels: {type: int, low: 3, high: 11, step: 4}
data.split_seed: {type: int, low: 0, high: 9}
batch.global_batch_size: {type: int, low: 1, high: 64, log: true}
data.test_ratio: {type: float, low: 0.2, high: 0.2}
optim.use: {type: categorical, choices: [adamw, sgd]}
ema: {type: categorical, choices: [null, {decay: 0.9}]}
"""
PARAMETERS = {
    "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
    "optim.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.5},
    "model.dropout": {"values": [0.1, 0.25, 0.4]},
    "model.channels": {"values": [3, 7, 11]},
    "data.split_seed": {"distribution": "int_uniform", "min": 0, "max": 9},
    "batch.global_batch_size": {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 64},
    "data.test_ratio": {"value": 0.2},
    "optim.use": {"values": ["adamw", "sgd"]},
    "ema": {"values": ["null", '{"decay": 0.9}']},
}  # fmt: skip
GIVEN = {
    "optim.lr": 0.1 + 1e-12, "optim.weight_decay": 0, "model.dropout": 0.25, "model.channels": 7.0,
    "data.split_seed": 3, "batch.global_batch_size": 5.0, "data.test_ratio": 0.2,
    "optim.use": "sgd", "ema": '{"decay": 0.9}',
}  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def settings(text, objective="accuracy"):
    space, base = checked(text)
    return Settings(space, parse_objectives([objective], base.values()), "wandb", "none", base)


def test_a_space_is_the_config_of_a_sweep():
    found = sweep_config(settings(SPACE), "bayes", "digits")
    assert found.pop("parameters") == PARAMETERS
    assert found == {
        "name": "digits", "method": "bayes",
        "metric": {"name": "eval/accuracy", "goal": "maximize"},
    }  # fmt: skip
    assert sweep_config(settings(LR, "loss"), "random", "d")["metric"]["goal"] == "minimize"


def test_a_grid_has_lists():
    text = "model.channels: {type: int, low: 8, high: 10}\n"
    found = sweep_config(settings(text), "grid", "digits")
    assert found["parameters"] == {"model.channels": {"values": [8, 9, 10]}}


def given(**changed):
    values = GIVEN | {key.replace("__", "."): value for key, value in changed.items()}
    space, _ = checked(SPACE)
    return given_values(space, {key: {"value": v} for key, v in values.items()}, "me/p/s")


def test_values_of_a_sweep_are_those_of_the_space():
    found = given()
    assert found == {**GIVEN, "optim.lr": 0.1}
    kinds = [type(found[key]) for key in ("model.channels", "batch.global_batch_size")]
    assert kinds == [int, int]
    assert type(found["optim.weight_decay"]) is float


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim__lr", 0.2), ("optim__lr", "0.1"), ("optim__lr", True), ("optim__lr", float("nan")),
        ("model__channels", 8), ("model__channels", 15), ("model__dropout", 0.2),
        ("data__split_seed", 2.5), ("data__split_seed", None), ("optim__use", "adam"),
        ("ema", {"decay": 0.9}),
    ],
)  # fmt: skip
def test_values_that_the_space_does_not_have_are_refused(key, value):
    with pytest.raises(UsageError, match="sweep me/p/s gives .* which is not in the space"):
        given(**{key: value})


def test_a_run_without_a_value_is_refused():
    space, _ = checked(SPACE)
    with pytest.raises(UsageError, match=r"without a value for optim\.lr \(but for lr\); restore"):
        given_values(space, {"lr": {"value": 0.1}}, "me/p/s")


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("wandb:method=baies", "must be one of bayes, random, grid; did you mean bayes?"),
        ("wandb:seed=3", "seed is not an option of wandb; it has method"),
        ("wandb:bayes", "is not of the form option=value"),
    ],
)
def test_a_wrong_method_is_refused(word, text):
    with pytest.raises(UsageError, match=text.replace("?", r"\?")):
        check_method("sampler", word)


def test_methods():
    words = ["wandb", "wandb:method=grid", "tpe", "random"]
    assert [wandb_method(word) for word in words] == ["bayes", "grid", "", ""]


@pytest.mark.parametrize(
    ("space", "words", "text"),
    [
        (LR, ["--sampler", "tpe"], "--sampler is 'tpe', but with --wandb it must be one of bayes"),
        (LR, ["--objective", "loss", "--objective", "accuracy"], "2 objectives, but a W&B sweep"),
        (LR, ["--pruner", "halving:min_steps=2"], "does not let the runs of a sweep pause"),
        (LR, ["track.wandb=offline"], "track.wandb is 'offline', but the runs of a W&B sweep must"),
        (LR, ["--sampler", "grid"], "optim.lr is a range of floats without a step"),
        (
            "optim.use: {type: categorical, choices: [adamw, sgd]}\n"
            "optim.momentum: {type: float, low: 0.5, high: 0.9, when: {optim.use: sgd}}\n",
            [], "optim.momentum has conditions (when, ",
        ),
    ],
)  # fmt: skip
def test_what_a_sweep_cannot_do_is_refused(capsys, tmp_path, space, words, text):
    file = tmp_path / "space.yaml"
    file.write_text(space)
    study = tmp_path / "study"
    arguments = [*BASE, "--space", str(file), "--wandb", *words, f"run.dir={study}"]
    code, said = refused(capsys, *arguments)
    assert code == 64
    assert text in said
    assert not study.exists()


@pytest.mark.slow
def test_trials_are_the_runs_that_the_server_gives(server, tmp_path):
    values = [0.3, 0.1, 0.7, 0.5]
    server.sweeps.values.extend({"optim.lr": value} for value in values)
    said = run(tmp_path / "study", LR, "--wandb", "--parallel", "2", "--objective", "accuracy")
    assert "sampler wandb:method=bayes" in said
    assert f"W&B sweep: {server.url}/me/isorun/sweeps/sweep0" in said
    assert "W&B has no more runs for this sweep." in said
    trials = shown(tmp_path / "study")["trials"]
    assert {trial["state"] for trial in trials} == {"finished"}
    assert len(server.sweeps.agents) == 2, "one for each trial at a time"
    found = {}
    for trial in trials:
        directory = tmp_path / "study" / "trials" / f"{trial['number']:04}"
        variables = json.loads((directory / "wandb.json").read_text())
        found[variables["WANDB_RUN_ID"]] = trial["params"]
        wanted = {
            "WANDB_SWEEP_ID": "sweep0", "WANDB_ENTITY": "me", "WANDB_PROJECT": "isorun",
            "WANDB_RUN_GROUP": "digits", "WANDB_SWEEP_PARAM_PATH": f"{directory}.wandb.yaml",
        }  # fmt: skip
        assert wanted.items() <= variables.items()
        assert "WANDB_SERVICE" not in variables, "that of tune may end before the trial"
    assert found == {name: given for name, given, _ in server.sweeps.given}


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_same_runs(server, tmp_path):
    server.sweeps.values.extend({"optim.lr": value} for value in (0.3, 0.1))
    options = ["--wandb", "--sampler", "random", "--trials", "2"]
    process = start(tmp_path / "study", LR, *options, step=0.2)
    first = tmp_path / "study" / "trials" / "0000"
    wait_for((first / "metrics.jsonl").exists)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(tmp_path / "study", LR, *options)
    assert [name for name, _, _ in server.sweeps.given] == ["run0", "run1"]
    assert len(server.sweeps.configs) == 1
    assert starts(tmp_path / "study", 0) == 2
    assert json.loads((first / "wandb.json").read_text())["WANDB_RUN_ID"] == "run0"
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"] * 2
    said = run(tmp_path / "study", LR, "--trials", "2", expect=76)
    assert "sampler: wandb:method=random -> tpe" in said


@pytest.mark.slow
def test_a_run_that_the_server_stops_is_pruned(server, tmp_path):
    server.sweeps.values.extend({"optim.lr": value} for value in (0.3, 0.1))
    server.sweeps.stops.add("run0")
    run(tmp_path / "study", LR, "--wandb", "--trials", "2", step=0.5)
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["pruned", "finished"]


@pytest.mark.slow
def test_trials_run_on_while_the_server_fails(server, tmp_path):
    server.sweeps.values.extend({"optim.lr": value} for value in (0.3, 0.1))
    first = tmp_path / "study" / "trials" / "0000"
    server.fault = lambda operation: (
        400 if operation == "Heartbeat" and first.exists()
        and not (first / "finished.json").exists() else None
    )  # fmt: skip
    said = run(tmp_path / "study", LR, "--wandb", "--trials", "2", step=0.2)
    assert said.count("warning: W&B does not answer") == 1
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"] * 2


@pytest.mark.slow
def test_a_deleted_sweep_ends_the_study(server, tmp_path):
    server.sweeps.values.append({"optim.lr": 0.3})
    first = tmp_path / "study" / "trials" / "0000"
    server.fault = lambda operation: (
        404 if operation == "Heartbeat" and first.exists() else None
    )  # fmt: skip
    said = run(tmp_path / "study", LR, "--wandb", "--trials", "2", step=0.5, expect=64)
    assert "W&B has no sweep me/isorun/sweep0 any more" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "code", "text"),
    [
        ({"WANDB_API_KEY": None}, 64, "There are no credentials for W&B"),
        ({"WANDB_API_KEY": "short"}, 64, "W&B refuses the sweep (WANDB_API_KEY invalid"),
        ({"WANDB_BASE_URL": "nonsense"}, 64, "W&B refuses its setting base_url (Input should be"),
        ({"WANDB_MODE": "offline"}, 64, "WANDB_MODE is 'offline'"),
        slow(({"WANDB_BASE_URL": "http://127.0.0.1:9"}, 75, "W&B cannot be reached")),
    ],
)
def test_a_server_that_cannot_be_used_leaves_no_study(
    server, tmp_path, monkeypatch, changed, code, text
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in changed.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    said = run(tmp_path / "study", LR, "--wandb", expect=code)
    assert text in said
    assert not (tmp_path / "study" / "study.json").exists()


@pytest.mark.slow
def test_a_trial_is_a_whole_distributed_run_of_the_sweep(server, tmp_path):
    space = LR + "model.channels: {type: int, low: 8, high: 24, step: 8}\n"
    server.sweeps.values.append({"optim.lr": 0.05, "model.channels": 16})
    options = ["--wandb", "--trials", "1", "--processes", "2", "length.epochs=null",
               "length.steps=8", "schedule.warmup_steps=0", "evaluate.every_steps=4"]  # fmt: skip
    process = start_real(tmp_path / "study", space, *options)
    assert process.wait(300) == 0, process.stdout.read()
    found = server.runs["run0"]
    assert found.upserts[0]["sweep"] == "sweep0"
    config = json.loads(found.upserts[0]["config"])
    assert (config["optim.lr"]["value"], config["model.channels"]["value"]) == (0.05, 16)
    assert config["optim"]["value"]["lr"] == 0.05
    assert config["model"]["value"]["channels"] == 16
    assert found.upserts[0]["groupName"] == "digits"
    assert found.steps[-1] == 8
    (values,) = shown(tmp_path / "study")["trials"][0]["values"]
    assert found.summary["eval/loss"] == values
    assert os.listdir(tmp_path / "study" / "trials" / "0000" / "wandb")
