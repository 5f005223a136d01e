"""Early stopping: what counts as an improvement, and that a restart does not change it."""

import json
import signal

import pytest

from tests.support.forked import run, start, wait_for
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, curve, state, tensors
from train.checkpoint.store import CheckpointStore
from train.exits import UsageError
from train.loop.early_stop import EarlyStop, EarlyStopConfig

NAN, INF = float("nan"), float("inf")


def watch(values, **rules):
    """The number of evaluations before it stops; None if it does not stop."""
    early_stop = EarlyStop(EarlyStopConfig(**rules))
    for number, value in enumerate(values, start=1):
        early_stop.update({"loss": value, "other": 0.0})
        if early_stop.stopped:
            return number
    return None


@pytest.mark.parametrize(
    ("values", "rules", "expected"),
    [
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
        ([5, 6], {"patience": 1}, 2),
        ([5, 5, 5], {"patience": 2}, 3),
        ([5, 6, 4, 6, 6, 6], {"patience": 3}, 6),
        ([1, 2, 3, 4], {"patience": 1, "mode": "max"}, None),
        ([4, 3, 2], {"patience": 2, "mode": "max"}, 3),
        ([5.0, 4.95, 4.9, 4.85], {"patience": 3, "min_delta": 0.2}, 4),
        ([5.0, 4.75, 4.5], {"patience": 1, "min_delta": 0.2}, None),
        ([1.0, 1.25, 1.5], {"patience": 1, "min_delta": 0.25, "mode": "max"}, 2),
        ([NAN, NAN], {"patience": 2}, 2),
        ([NAN, 5, NAN, 4], {"patience": 2}, None),
        ([-INF, 5, 4], {"patience": 2}, None),
    ],
)
def test_the_number_of_evaluations_before_a_stop(values, rules, expected):
    assert watch(values, **rules) == expected


def test_a_metric_that_is_not_reported_is_refused():
    with pytest.raises(UsageError) as error:
        EarlyStop(EarlyStopConfig(metric="accurracy")).update({"loss": 1.0, "accuracy": 0.5})
    assert str(error.value) == (
        "early_stop.metric is 'accurracy', but the task's evaluation reports only accuracy, loss; "
        "name one of these."
    )


def test_its_state_can_be_saved_as_json():
    first = EarlyStop(EarlyStopConfig(patience=3))
    for value in (5, 6, 7):
        first.update({"loss": value})
    second = EarlyStop(EarlyStopConfig(patience=3))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    second.update({"loss": 8})
    assert second.stopped


# The first evaluation stays the best: no later one improves by a million.
RULES = ["evaluate.every_steps=5", "early_stop.patience=3", "early_stop.min_delta=1e6"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stopped")
    done = run("fit", directory, *RULES)
    assert "Finished: 20 steps (early stop)" in done.stdout
    return directory


def test_early_stopping_ends_a_run(stopped):
    finished = json.loads((stopped / "finished.json").read_text())
    assert finished["early_stopped"]
    assert finished["step"] == 20
    assert list(curve(stopped, "eval/loss")) == [5, 10, 15, 20]
    assert finished["metrics"]["loss"] == curve(stopped, "eval/loss")[20]
    assert "is already finished, at step 20" in run("fit", stopped, *RULES).stdout
    assert "all well" in run("verify", stopped).stdout


@pytest.mark.parametrize("step", [slow(7), 13, slow(18)])
def test_a_restart_changes_nothing(stopped, tmp_path, step):
    """Killed after 0, 1 and 2 of the 3 evaluations without improvement."""
    base = [*RULES, "checkpoint.every_steps=5"]
    killed = [f"task.kill_at_step={step}", "checkpoint.asynchronous=false"]
    run("fit", tmp_path, *base, *killed, expect=-9)
    assert state(tmp_path)["early_stop"]["waited"] == step // 5 - 1
    run("fit", tmp_path, *base)
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 20
    assert_same_bits(tensors(stopped), tensors(tmp_path))
    assert state(tmp_path)["early_stop"] == state(stopped)["early_stop"]


def test_a_run_with_a_metric_that_is_not_reported_ends_with_one_sentence(tmp_path):
    done = run("fit", tmp_path, *RULES, "early_stop.metric=accuracy", expect=64)
    (line,) = done.stderr.splitlines()
    assert "early_stop.metric is 'accuracy', but the task's evaluation reports only loss" in line


@pytest.mark.slow
def test_an_evaluation_at_the_start_counts_once(tmp_path):
    """If the run stops right after it, the resumed run does not count the same weights again."""
    base = ["evaluate.at_start=true", "early_stop.metric=loss", "early_stop.mode=min"]
    base += ["early_stop.patience=1"]
    process = start("fit", tmp_path, *base, "task.sleep=0.2")
    wait_for(
        process, lambda: (tmp_path / "metrics.jsonl").exists() and curve(tmp_path, "eval/loss")
    )
    process.signal(signal.SIGTERM)
    assert process.wait().returncode == 143
    run("fit", tmp_path, *base)
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 40


@pytest.mark.slow
def test_an_evaluation_after_a_restart_belongs_to_its_checkpoint(tmp_path):
    """A stop interrupts the evaluation at step 10. It runs after the restart, and step 10 can be
    the best."""
    base = ["evaluate.every_steps=10", "checkpoint.every_steps=10", "checkpoint.keep_last=9"]
    task = ["task.use=tests.faults.tasks:StopsInEvaluation"]
    run("fit", tmp_path, *base, *task, expect=143)
    assert stored_metrics(tmp_path) == {}
    run("fit", tmp_path, *base, *task)
    assert sorted(stored_metrics(tmp_path)) == [10, 20, 30, 40]
    assert stored_metrics(tmp_path)[10]["loss"] == curve(tmp_path, "eval/loss")[10]
    assert "all well" in run("verify", tmp_path).stdout


def stored_metrics(directory):
    return CheckpointStore(directory / "checkpoints").metrics()
