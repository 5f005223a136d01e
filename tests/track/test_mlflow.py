"""The MLflow sink, checked with MLflow's own stores and server."""

import ast
import importlib
import json
import math
import socket

import numpy as np
import pytest

import train
from tests.support.lanes import thinned
from tests.support.runs import ROOT, TINY
from tests.track.conftest import run_info
from tests.track.mlflow_server import MlflowServer
from train.exits import RunError
from train.plugins import Plugin
from train.track.event_log import EVENTS, EventLog
from train.track.metrics_file import MetricsFile
from train.track.mlflow_sink import MlflowSink
from train.track.sinks import make_sinks

pytestmark = pytest.mark.normal  # the import of MLflow and its database take seconds
SINK = "train.track.mlflow_sink:MlflowSink"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'isorun[mlflow]'")
    monkeypatch.chdir(tmp_path)  # MLflow's place for the artifacts of a database
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in MlflowSink.defaults.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # the machine may be busy


def made(directory, options, **changes):
    (sink,) = make_sinks([Plugin(use=SINK, options=options)], run_info(directory, **changes))
    sink.load()
    sink.open()
    return sink


def attempt(directory, uri, number, start, end, *, exit_code=None, **changes):
    """An attempt that is killed after the step ``end``, or ends with an exit code."""
    rows = MetricsFile(directory / "metrics.jsonl", start_step=start, attempt=number)
    sink = made(directory, {"tracking_uri": uri}, attempt=number, start_step=start, **changes)
    sink.event(start, f"Attempt {number} starts.")
    for step in range(start + 1, end + 1):
        for metrics in [
            {"train/loss": step + number / 10},
            *[{"eval/loss": 1.0}] * (step % 10 == 0),
        ]:
            rows.log(step, metrics)
            sink.log(step, metrics)
        if step % 10 == 0:
            image = np.full((3, 4, 6), number, np.uint8)
            sink.report(step, {"sample": f"by {number}", "drawn/0": image})
        rows.advance(step + 1)
        sink.advance(step + 1)
    rows.flush(end)
    if exit_code is not None:
        sink.summary({"loss": 0.5, "goodput/percent": 90.0})
        sink.end(exit_code)
        sink.close()
    return sink


def test_events_of_a_killed_attempt_are_completed_by_a_later_one(tmp_path):
    uri = (tmp_path / "mlruns").as_uri()
    for number in (1, 2, 3):
        log = EventLog(tmp_path / EVENTS, number)
        sink = made(tmp_path, {"tracking_uri": uri}, attempt=number, start_step=20)
        for step in (20, 30):
            log.append(step, f"{number} at {step}.")
        log.close()
        sink.event(20, f"{number} at 20.")
        if number != 2:  # killed before it sent anything
            sink.advance(21)
        if number == 3:
            sink.event(30, "3 at 30.")
            sink.close()
    client, run = the_run(uri)
    for number in (1, 2, 3):
        expected = f"step 20: {number} at 20.\nstep 30: {number} at 30.\n"
        assert text(client, run, f"events/attempt-{number:04d}.txt") == expected


def the_run(uri, experiment="isorun"):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run


def history(client, run, name):
    found = client.get_metric_history(run.info.run_id, name)
    return {metric.step: metric for metric in found}, [metric.step for metric in found]


def text(client, run, path):
    place = client.download_artifacts(run.info.run_id, path)
    with open(place) as file:
        return file.read()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    for library in ("sqlalchemy", "alembic"):
        pytest.importorskip(library, reason=f"a database of MLflow's needs {library}")
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'mlflow.db'}"


@pytest.fixture(params=["files", "database"])
def store(request, tmp_path):
    if request.param == "database":
        return request.getfixturevalue("database")
    return (tmp_path / "mlruns").as_uri()


@pytest.mark.slow
def test_attempts_that_are_killed_are_one_run_with_each_step_once(tmp_path, store):
    facts = {"placement": {"strategy": "ddp", "hosts": ["a", "b"]}, "model_summary": "a model"}
    code = {"isorun": "0.1.0", "commit": "abc123"}
    attempt(tmp_path, store, 1, 0, 70)
    attempt(tmp_path, store, 2, 40, 45)
    attempt(tmp_path, store, 3, 40, 130)
    attempt(tmp_path, store, 4, 120, 150, exit_code=0, facts=facts, code=code)
    client, run = the_run(store)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits")
    loss, steps = history(client, run, "train/loss")
    assert steps == list(range(1, 151))
    attempts = [metric.value for metric in history(client, run, "attempt")[0].values()]
    assert attempts == sorted(attempts)
    assert {1, 3, 4} <= set(attempts)
    for step, metric in loss.items():
        assert metric.value == pytest.approx(step + attempts[step - 1] / 10)
    committed = {
        json.loads(line)["step"]: json.loads(line) for line in (tmp_path / "metrics.jsonl").open()
    }
    assert abs(loss[120].timestamp - 1000 * committed[120]["time"]) < 1000
    assert history(client, run, "eval/loss")[1] == list(range(10, 151, 10))
    assert history(client, run, "final/loss")[1] == [150]
    assert run.data.metrics["goodput/percent"] == 90.0
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.tags["placement.strategy"] == "ddp"
    assert run.data.tags["isorun.attempt"] == "4"
    assert run.data.tags["mlflow.source.git.commit"] == "abc123"
    assert text(client, run, "samples/step-00000150/sample.txt") == "by 4"
    assert text(client, run, "events/attempt-0004.txt") == "step 120: Attempt 4 starts.\n"
    assert text(client, run, "events/attempt-0003.txt") == "step 40: Attempt 3 starts.\n"
    assert text(client, run, "model.txt") == "a model"
    assert {f.path for f in client.list_artifacts(run.info.run_id, "samples/step-00000150")} == {
        "samples/step-00000150/sample.txt", "samples/step-00000150/drawn_0.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "status"), [(0, "FINISHED"), (143, "KILLED"), (130, "KILLED"), (65, "FAILED")]
)
def test_the_status_follows_from_the_exit_code(tmp_path, code, status):
    store = (tmp_path / "mlruns").as_uri()
    attempt(tmp_path, store, 1, 0, 3, exit_code=code)
    assert the_run(store)[1].info.status == status
    attempt(tmp_path, store, 2, 3, 4)
    assert the_run(store)[1].info.status == "RUNNING", "it is resumed"


def test_the_run_is_found_where_its_id_is_lost_and_made_anew_in_another_store(tmp_path):
    store = (tmp_path / "mlruns").as_uri()
    attempt(tmp_path, store, 1, 0, 10, exit_code=143)
    (tmp_path / "mlflow" / "run.json").unlink()
    attempt(tmp_path, store, 2, 10, 20, exit_code=143)
    client, run = the_run(store)
    assert history(client, run, "train/loss")[1] == list(range(1, 21))
    other = (tmp_path / "other").as_uri()
    attempt(tmp_path, other, 3, 20, 30, exit_code=143)
    client, run = the_run(other)
    assert history(client, run, "train/loss")[1] == list(range(1, 31))
    client.delete_run(run.info.run_id)
    attempt(tmp_path, other, 4, 30, 40, exit_code=0)
    client, run = the_run(other)
    assert history(client, run, "train/loss")[1] == list(range(1, 41))


def test_limits_of_mlflow_are_kept_and_nothing_has_secrets(tmp_path, store):
    config = {
        "task": {f"option_{i}": i for i in range(250)} | {"text": "x" * 10_000, "y" * 400: 1},
        "optim": {"lr": 0.1, "betas": [0.9, 0.99], "clip": None, "fused": True},
        "run": {"password": "hunter2hunter2"},
    }
    identity = f"limits-{store[:4]}"
    options = {"tracking_uri": store, "experiment": identity, "tags": {"team": "z" * 9000}}
    odd = {"eval/accuracy@5": 1.0, "eval/../x": 2.0, "/y//": 3.0, "z" * 300: 4.0, "n": math.nan}
    sink = made(tmp_path, {**options, "run_name": "mine"}, config=config, id=identity)
    sink.log(1, odd)
    sink.end(0)
    sink.close()
    config["optim"]["lr"] = 0.2  # MLflow refuses to change parameters
    sink = made(tmp_path, options, config=config, id=identity, attempt=2, start_step=1)
    sink.log(2, odd)
    sink.end(0)
    sink.close()
    client, run = the_run(store, identity)
    params = run.data.params
    assert len(params) == 250 + 2 + 4 + 1 + 1
    assert (params["task.option_7"], params["optim.betas"]) == ("7", "[0.9, 0.99]")
    assert (params["optim.fused"], params["optim.clip"]) == ("true", "null")
    assert params["optim.lr"] == "0.1"
    assert len(params["task.text"]) == 500
    assert params["run.password"] == "***"
    assert len(run.data.tags["team"]) == 5000
    assert run.info.run_name == "mine"
    metrics = run.data.metrics
    assert {"eval/accuracy_5", "eval/_/x", "_/y/_/_", "n", "attempt"} < set(metrics)
    assert max(map(len, metrics)) == 250
    assert math.isnan(metrics["n"])
    assert len(metrics) == 6
    shown = json.loads(text(client, run, "config.json"))
    assert shown["optim"]["lr"] == 0.2
    assert shown["run"] == {"password": "***"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """MLflow's server, whose store is in files."""
    pytest.importorskip("flask")
    directory = tmp_path_factory.mktemp("server")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    patch.setenv("_MLFLOW_SERVER_FILE_STORE", str(directory))
    patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(directory))
    from mlflow.server import app

    server = MlflowServer(app)
    yield server
    server.stop()
    patch.undo()


FAULTS = {
    "500": lambda path, count: "500" if count == 0 else None,
    "500 of everything": lambda path, count: "500",
    "answers that are lost": lambda path, count: "lost" if count % 2 == 0 else None,
    "hangs": lambda path, count: "hang" if path == "runs/log-batch" and count == 1 else None,
}


@pytest.mark.parametrize("fault", thinned(list(FAULTS), kept=list(FAULTS)[:2]))
def test_a_server_that_fails_gets_each_step_once_later(
    tmp_path, server, fault, caplog, monkeypatch
):
    if fault == "hangs":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    identity = f"run-{list(FAULTS).index(fault)}"
    server.fault, server.counts = FAULTS[fault], {}
    sink = attempt(tmp_path, server.uri, 1, 0, 130, id=identity)
    sink.end(75)
    sink.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [w for w in warnings if w.startswith("MLflow cannot be written")]
    assert "\n" not in warning
    server.fault = None
    attempt(tmp_path, server.uri, 2, 120, 140, id=identity, exit_code=0)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("isorun").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`isorun.run_id` = '{identity}'")
    assert run.info.status == "FINISHED"
    assert history(client, run, "train/loss")[1] == list(range(1, 141))
    assert text(client, run, "samples/step-00000140/sample.txt") == "by 2"


def test_without_a_server_there_is_one_warning_and_the_run_goes_on(tmp_path, track, capfd):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        uri = f"http://user:secretpassword1@127.0.0.1:{unused.getsockname()[1]}"
    options = {"tracking_uri": uri}
    config = {
        "tensorboard": False,
        "wandb": "disabled",
        "sinks": [{"use": SINK, "options": options}],
    }
    tracker = track(None, config=config)
    for step in range(1, 200):
        tracker.log(step, {"train/loss": 1.0})
        tracker.progress(step + 1)
    tracker.report(199, {"sample": "text"})
    tracker.end(0)
    tracker.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow cannot be written (")
    assert "secretpassword1" not in line
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 200))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tracking_uri": 7}, "its option tracking_uri is 7; set a text."),
        ({"experiment": " "}, "its option experiment is ' '; set a text."),
        ({"tags": ["a"]}, "its option tags is ['a']; set a mapping"),
        ({"tracking_url": "x"}, "does not accept the options"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(tmp_path, options, said):
    with pytest.raises(RunError) as caught:
        made(tmp_path, options)
    assert said in str(caught.value)
    assert SINK in str(caught.value)
    assert caught.value.code == 64


def test_by_default_a_run_has_a_store_of_its_own(tmp_path):
    (sink,) = make_sinks([Plugin(use=SINK)], run_info(tmp_path))
    sink.load()
    store = tmp_path / "mlflow" / "store"
    assert sink.open().endswith(f"mlflow ui --backend-store-uri {store}")
    sink.log(1, {"train/loss": 1.0})
    sink.end(0)
    sink.close()
    client, run = the_run(store.as_uri())
    assert run.info.status == "FINISHED"
    assert history(client, run, "train/loss")[1] == [1]
    assert run.info.artifact_uri.startswith(store.as_uri())


def test_a_run_that_names_the_sink_in_its_config(tmp_path, monkeypatch, capfd):
    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train.fit(
        *TINY, "length.steps=8", "evaluate.every_steps=4", "track.log_every_steps=1",
        f"run.dir={tmp_path / 'run'}", f"track.sinks=[{SINK}]",
    )  # fmt: skip
    assert "warning" not in capfd.readouterr().err
    client, run = the_run(store, "mine")
    assert run.info.status == "FINISHED"
    assert history(client, run, "train/loss")[1] == list(range(1, 9))
    assert history(client, run, "eval/loss")[1] == [4, 8]
    assert {"final/loss", "goodput/percent", "goodput/wall_seconds"} < set(run.data.metrics)
    assert run.data.params["length.steps"] == "8"
    assert run.data.params["placement.world_size"] == "1"


def test_the_sink_uses_only_what_sinks_of_users_may_use():
    """Names that ``import train`` has, which docs/extending.md promises."""
    used = set()
    for name in ("mlflow_sink", "mlflow_run"):
        tree = ast.parse((ROOT / "train" / "track" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "train":
                module = importlib.import_module(node.module)
                used |= {getattr(module, alias.name) for alias in node.names}
    outside = {item for item in used if not item.__module__.startswith("train.track.mlflow")}
    assert outside == {train.Exit, train.RunError, train.Sink}
