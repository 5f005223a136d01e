"""The Python API: runs from scripts and notebooks."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from tests.support.runs import ROOT, TINY, environment
from tests.support.tiny import TinyTask
from train.distributed.world import this_world
from train.exits import ResumeRefusedError, UsageError
from train.session import environment_restored, torch_restored
from train.tasks.registry import reference_of

QUICK = [*TINY, "length.steps=6", "track.console=quiet"]


def fit(directory, *overrides, **options):
    return train.fit(*QUICK, f"run.dir={directory}", *overrides, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return fit(directory, "evaluate.every_steps=3", "checkpoint.every_steps=3")


def test_a_run_returns_its_result_and_a_view_of_its_directory(finished):
    assert (finished.exit, finished.step) == (train.Exit.DONE, 6)
    run = finished.run
    assert run.finished["metrics"] == finished.metrics
    assert run.config["length"]["steps"] == 6
    steps, losses = run.metrics["train/loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert losses.dtype == np.float64
    assert run.metrics["eval/loss"].steps.tolist() == [3, 6]
    assert [checkpoint.step for checkpoint in run.checkpoints] == [3, 6]
    assert run.checkpoints[-1].metrics == finished.metrics
    assert [attempt["attempt"] for attempt in run.attempts] == [1]


def test_a_finished_run_returns_the_same_result_again(finished):
    again = fit(finished.directory, "evaluate.every_steps=3", "checkpoint.every_steps=3")
    assert again == finished


def test_evaluate_returns_the_metrics_of_a_checkpoint(finished):
    where = [*QUICK, f"run.dir={finished.directory}"]
    assert train.evaluate(*where) == pytest.approx(finished.metrics)
    first = finished.run.checkpoints[0]
    assert train.evaluate(*where, checkpoint=3) == pytest.approx(dict(first.metrics))


def test_runs_in_one_process_affect_neither_each_other_nor_the_process(finished, tmp_path, request):
    def mine():
        root = logging.getLogger()
        return (
            [*root.handlers], root.level, warnings.showwarning,
            [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
            torch.are_deterministic_algorithms_enabled(), dist.is_initialized(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_num_threads(),
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        )  # fmt: skip

    torch.use_deterministic_algorithms(True, warn_only=True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.rand(1), np.random.rand(), random.random()  # no longer as a run leaves them
    before = mine()
    other = fit(tmp_path / "bf16", "precision=bf16", "deterministic=true")
    same = fit(tmp_path / "same", "evaluate.every_steps=3")
    assert mine() == before
    assert same.metrics == finished.metrics != other.metrics
    log = (tmp_path / "bf16" / "logs" / "rank-0.log").read_text()
    assert str(same.run.id) not in log, "each run must have its own log file"


def test_settings_of_torch_are_restored_also_after_a_failed_run():
    settings = {
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "number of threads": torch.get_num_threads,
        "default device": torch.get_default_device,
    }
    before = {name: read() for name, read in settings.items()}

    def fail():
        with torch_restored():
            torch.set_float32_matmul_precision("medium")
            torch.set_num_threads(before["number of threads"] + 1)
            torch.set_default_device("meta")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: read() for name, read in settings.items()} == before


def test_a_run_starts_after_one_that_failed_to_start(finished, tmp_path, monkeypatch):
    """The process group of the failed start must not be taken for the caller's."""
    with monkeypatch.context() as patch:
        patch.setattr(accelerate, "Accelerator", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, "strategy=ddp")
    assert fit(tmp_path, "strategy=ddp").metrics == pytest.approx(finished.metrics)


def test_variables_of_torch_from_srun_stay_after_a_run(monkeypatch):
    """They are read once for all runs of the process."""
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1"}
    monkeypatch.setattr(os, "environ", {**os.environ, **srun})
    this_world.cache_clear()
    try:
        for _ in range(2):
            with environment_restored():
                assert this_world().world_size == 2
                assert os.environ["WORLD_SIZE"] == "2"
                os.environ["OF_THE_RUN"] = "1"
            assert "OF_THE_RUN" not in os.environ
    finally:
        this_world.cache_clear()


def test_files_and_overrides_come_in_any_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("length: {steps: 3}\nbatch: {global_batch_size: 4}\n")
    loaded = train.load_config("optim.lr=0.5", file, task=TinyTask)
    assert (loaded.config.optim.lr, loaded.config.length.steps) == (0.5, 3)
    assert loaded.config.task.use == "tests.support.tiny:TinyTask"
    assert loaded.composed.origin("length.steps") == f"{file}:1"


@pytest.mark.parametrize("call", [train.fit, train.evaluate, train.load_config])
@pytest.mark.parametrize("config", [QUICK, {"length.steps": 3}, 3, None])
def test_a_config_in_one_argument_is_refused(call, config):
    with pytest.raises(UsageError, match=r"each an argument of its own; .*\(\*config\)"):
        call(config)


def test_errors_are_exceptions_with_the_text_of_the_command_line(finished, capfd):
    with pytest.raises(UsageError) as caught:
        fit(finished.directory, "optim.lrr=1")
    assert str(caught.value).endswith("did you mean optim.lr?")
    assert caught.value.code == 64
    with pytest.raises(ResumeRefusedError, match="optim.lr: 0.01 -> 0.02"):
        fit(finished.directory, "optim.lr=0.02")
    with pytest.raises(UsageError, match="must be a subclass of train.Task"):
        fit(finished.directory, task=TinyTask(None))
    with pytest.raises(train.RunError, match="There is no run in"):
        train.Run(finished.directory / "logs")
    assert "error" not in capfd.readouterr().err, "errors must be raised, not printed"


def test_an_error_of_the_task_is_raised_unchanged_and_logged(tmp_path, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("in the task")

    monkeypatch.setattr(TinyTask, "misbehave", fail)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "in the task" in log
    assert "Traceback" in log
    monkeypatch.setattr(TinyTask, "misbehave", lambda self: None)
    assert fit(tmp_path).exit == train.Exit.DONE, "the directory is still locked"


def has_taken_a_step(directory):
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def interrupt(directory, times):
    """Sends Ctrl-C ``times`` times, the first time once the run has taken a step."""

    def work():
        while not has_taken_a_step(directory):
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.fixture
def own_handler():
    """Installs Python's default SIGINT handler: TorchX's local scheduler, in another test, replaces
    it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_handler")
def test_ctrl_c_saves_and_the_same_call_resumes(tmp_path, capfd):
    def call(sleep):
        return fit(tmp_path, "length.steps=30", f"task.sleep={sleep}", "track.console=plain")

    thread = interrupt(tmp_path, 1)
    stopped = call(0.05)
    thread.join()
    assert stopped.exit == train.Exit.PREEMPTED
    assert 0 < stopped.step < 30
    assert stopped.run.checkpoints[-1].step == stopped.step
    assert "Stopped on request" in capfd.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # Python's default handler is restored
    done = call(0.0)
    assert (done.exit, done.step) == (train.Exit.DONE, 30)
    assert done.run.attempts[1]["resumed_from_step"] == stopped.step


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    thread = interrupt(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, "length.steps=30", "task.sleep=0.5")
    thread.join()
    assert train.Run(tmp_path).checkpoints == []
    assert fit(tmp_path, "length.steps=30", "task.sleep=0").step == 30


def test_in_a_thread_the_stop_file_stops_the_run(tmp_path):
    results, problems = [], []

    def work():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            results.append(fit(tmp_path, "length.steps=100", "task.sleep=0.05"))
        problems.extend(str(warning.message) for warning in found)

    thread = threading.Thread(target=work)
    thread.start()
    while not has_taken_a_step(tmp_path):
        time.sleep(0.01)
    with pytest.raises(UsageError, match="another run is in progress in this process"):
        fit(tmp_path / "other")
    (tmp_path / "stop").touch()
    thread.join()
    assert results[0].exit == train.Exit.PREEMPTED
    assert any(str(tmp_path / "stop") in text for text in problems)


def test_a_process_group_of_the_caller_is_refused(tmp_path):
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="call it before init_process_group"):
            fit(tmp_path)
    finally:
        dist.destroy_process_group()


def test_a_call_at_the_top_of_a_task_s_module_is_refused(tmp_path, monkeypatch):
    (tmp_path / "unguarded.py").write_text("import train\ntrain.fit('task.use=text')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="put the call under `if __name__"):
        fit(tmp_path / "run", "task.use=unguarded:Any")


def module(name, **attributes):
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (module("__main__", __file__="/x/line.py", __spec__=None), "line:TinyTask"),
        (module("__main__", __spec__=types.SimpleNamespace(name="a.b")), "a.b:TinyTask"),
        (module("__main__", __file__="/x/my-line.py", __spec__=None), "__main__:TinyTask"),
        (module("__main__"), "__main__:TinyTask"),
    ],
)
def test_a_class_of_a_script_gets_the_name_that_the_command_line_resolves(
    main, expected, monkeypatch
):
    mine = type("TinyTask", (TinyTask,), {"__module__": "__main__"})
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert reference_of(mine) == expected


def notebook_task(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", module("__main__"))
    return type("CellTask", (TinyTask,), {"__module__": "__main__"})


def test_a_class_of_a_notebook_trains_only_in_the_notebook(tmp_path, monkeypatch):
    task = notebook_task(monkeypatch)
    where = [*QUICK, f"run.dir={tmp_path}"]
    done = train.fit(*where, "loader.workers=1", task=task)
    assert done.run.config["task"]["use"] == "__main__:CellTask"
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "put the task into a module to use `" in log, (
        "the log must not suggest a command, which could not import the class"
    )
    assert train.evaluate(*where, task=task) == pytest.approx(done.metrics)
    with pytest.raises(UsageError, match=r"cannot import the\s+task"):
        train.fit(*where, "loader.workers=1", "loader.multiprocessing_context=spawn", task=task)
    with pytest.raises(UsageError, match="is defined in a notebook"):
        train.launch(*where, task=task, processes=2)
    with pytest.raises(UsageError, match="was defined in a notebook or an interactive session"):
        train.load_config(*where, "task.use=__main__:CellTask")


def test_a_view_of_a_damaged_directory_shows_what_is_intact(tmp_path):
    identity = {"id": "r-1", "name": "r", "wandb_id": "r-1", "created": 1.0}
    (tmp_path / "run.json").write_text(json.dumps(identity))
    rows = '{"step": 1, "a": 2.0}\nno row\n{"step": 2, "a": null, "b": 1}\n'
    rows += '{"step": 2, "a": "x", "c": [1]}\n{"step": 3, "a'
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 1}\n{"att')
    run = train.Run(tmp_path)
    assert run.metrics["a"].steps.tolist() == [1, 2]
    assert np.isnan(run.metrics["a"].values[1])
    assert run.metrics["b"].values.tolist() == [1.0]
    assert "c" not in run.metrics
    assert run.attempts == [{"attempt": 1}]
    assert (run.finished, run.config, run.checkpoints) == (None, {}, [])


def test_import_train_imports_nothing_heavy():
    code = "import sys, train; train.RunError, train.Exit; print({'torch', 'numpy', 'pydantic', 'accelerate'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


SCRIPT = """
import sys
import train
from tests.support.tiny import TinyTask

class ScriptTask(TinyTask):
    def eval_dataset(self):
        return None

if __name__ == "__main__":
    *arguments, processes = sys.argv[1:]
    try:
        result = train.launch(*arguments, task=ScriptTask, processes=int(processes))
    except train.RunError as error:
        print(type(error).__name__, error)
        sys.exit(error.code)
    print("result", int(result.exit), result.step, len(result.run.attempts))
"""


def launch(tmp_path, *overrides):
    """Starts a script that launches two processes, from a directory other than its own."""
    (tmp_path / "two.py").write_text(SCRIPT)
    arguments = [*QUICK, f"run.dir={tmp_path / 'run'}", *overrides, "2"]
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "two.py"), *arguments], cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_script_launches_several_processes_and_forwards_ctrl_c_once(tmp_path):
    process = launch(tmp_path, "length.steps=200", "task.sleep=0.05")
    while not has_taken_a_step(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    code, step, attempts = map(int, out.split("result ")[1].split())
    assert (code, attempts) == (143, 1)
    assert 0 < step < 200
    assert train.Run(tmp_path / "run").attempts[0]["world_size"] == 2
    assert train.Run(tmp_path / "run").config["task"]["use"] == "two:ScriptTask"


@pytest.mark.slow
def test_the_error_of_the_first_rank_that_fails_is_raised(tmp_path):
    process = launch(tmp_path, "data.fail_at=50")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 65, err
    assert out.startswith("DataError The dataset Noisy failed at index 50 ")


def test_launch_checks_before_it_starts_anything(tmp_path, monkeypatch):
    where = [*QUICK, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UsageError, match="processes must be at least 1"):
        train.launch(*where, processes=0)
    with pytest.raises(UsageError, match="did you mean optim.lr"):
        train.launch(*where, "optim.lrr=1", processes=2)
    with pytest.raises(UsageError, match="batch.global_batch_size"):
        train.launch(*where, processes=13)
    assert not Path(tmp_path / "run").exists()


def test_launch_returns_a_result_when_stopped_before_there_is_a_run(tmp_path, monkeypatch):
    called = []

    def stopped(words, processes, *, grace):
        called.append((words[0], processes, grace))
        return train.Exit.PREEMPTED

    monkeypatch.setattr("train.api.run_ranks", stopped)
    result = train.launch(*QUICK, f"run.dir={tmp_path}/run", "stop.deadline=7", processes=2)
    assert result == train.Result(train.Exit.PREEMPTED, tmp_path / "run", 0, {})
    assert called == [("fit", 2, 7.0)]


@pytest.mark.slow
def test_runs_with_different_strategies_in_one_process(finished, tmp_path):
    """DeepSpeed and Accelerate keep the process groups of their first run, and set environment
    variables that later runs take for those of a launcher."""
    before = dict(os.environ)
    for number, strategy in enumerate(("zero1", "zero3", "zero1", "auto", "ddp", "fsdp2")):
        done = fit(tmp_path / str(number), f"strategy={strategy}")
        assert done.metrics == pytest.approx(finished.metrics, rel=1e-5), strategy
        assert dict(os.environ) == before, strategy
