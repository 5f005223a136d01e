"""An evaluation that fails: before the first step where possible, else without a loss of steps."""

import json
from pathlib import Path

import pytest

from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from tests.support.runs import checkpoints, curve
from tests.support.tiny import TinyTask

_SHORT = ["length.steps=2", "schedule.warmup_steps=0"]


def broken_at(step):
    """Settings of a run whose evaluation after this step fails."""
    return [
        "task.use=tests.faults.tasks:BreaksEvaluation", f"task.break_at={step}", "length.steps=9",
        "evaluate.every_steps=3", "checkpoint.every_steps=3", "batch.micro_batch_size=6",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "ranks"), thinned([(6, 1), (6, 2), (9, 1), (9, 2)], kept=[(6, 2), (9, 1)])
)
def test_an_evaluation_that_fails_loses_no_step(tmp_path, ranks, step):
    done = run_ranks(ranks, "fit", tmp_path, *broken_at(step), expect=None)
    assert done[-1].returncode == 70
    assert "this metric is broken" in done[-1].stderr
    assert f"The evaluation of step {step} failed. The step was saved before" in done[0].stderr
    assert checkpoints(tmp_path)[-1] == step
    assert not (tmp_path / "finished.json").exists()
    run_ranks(ranks, "fit", tmp_path, *broken_at(0))
    attempt = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert attempt["resumed_from_step"] == step
    assert sorted(curve(tmp_path, "eval/loss")) == [3, 6, 9]
    manifests = [
        tmp_path / f"checkpoints/step-{s:012d}/manifest.json" for s in checkpoints(tmp_path)
    ]
    assert all(json.loads(path.read_text())["metrics"] for path in manifests)


def test_a_mistake_in_the_metrics_is_found_before_the_first_step(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:BadMeasure", expect=64)
    assert "measure() returned Tensor for 'loss'" in done.stderr
    assert not (tmp_path / "attempts.jsonl").exists()
    done = run("fit", tmp_path, "early_stop.metric=acuracy", expect=64)
    assert (
        "early_stop.metric is 'acuracy', but the task's evaluation reports only loss" in done.stderr
    )
    assert not (tmp_path / "config.json").exists()


class BadReport(TinyTask):
    def report(self, model, device):
        return ["text"]


class BadCheckReport(TinyTask):
    def check_report(self, model, device):
        return ["text"]


class SlowReport(TinyTask):
    """Logs its reports to the file ``report``, and has a shorter one for the check."""

    def report(self, model, device):
        return self._log("whole")

    def check_report(self, model, device):
        return self._log("short")

    def _log(self, kind):
        with Path(self.config.run.dir, "report").open("a") as file:
            print(kind, file=file)
        return {"kind": kind}


class BadReportOfASubclass(SlowReport):
    """Has a check_report that does not call this report."""

    def report(self, model, device):
        return ["text"]


class RareMetric(TinyTask):
    """Has a metric of the last samples, which the rehearsal before the first step does not see."""

    def measure(self, model, batch):
        found = dict(super().measure(model, batch))
        if len(batch["x"]) == 1:
            found["rare"] = found["loss"]
        return found


class Clips(TinyTask):
    """Keeps the weights of a layer in bounds, which hold after the first pass."""

    def loss(self, model, batch):
        model[0].weight.data.clamp_(-0.1, 0.1)
        return super().loss(model, batch)


class SwitchesMode(TinyTask):
    """Leaves the model in another mode."""

    def measure(self, model, batch):
        found = super().measure(model, batch)
        model.train()
        return found


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Clips, "changed the values of the parameters 0.weight"),
        (SwitchesMode, "left (the model itself), 0, 1 and 3 more in training mode"),
    ],
)
def test_what_an_evaluation_changes_of_the_model_is_refused(tmp_path, task, said):
    done = run("fit", tmp_path, f"task.use={__name__}:{task.__name__}", expect=64)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("task", "source"),
    [
        (BadReport, "report()"),
        (BadCheckReport, "check_report()"),
        (BadReportOfASubclass, "report()"),
    ],
)
def test_a_mistake_in_the_report_is_found_before_the_first_step(tmp_path, task, source):
    done = run("fit", tmp_path, f"task.use={__name__}:{task.__name__}", expect=64)
    assert f"The task's {source} returned list; return a dict" in done.stderr
    assert not (tmp_path / "attempts.jsonl").exists()


def test_the_report_of_the_check_may_be_shorter(tmp_path):
    run("fit", tmp_path, f"task.use={__name__}:SlowReport", *_SHORT)
    assert (tmp_path / "report").read_text().split() == ["short", "whole"]
    (saved,) = (tmp_path / "samples").iterdir()
    assert "whole" in saved.read_text()


@pytest.mark.parametrize(
    ("setting", "checked"),
    [
        ("evaluate.every_steps=5", ["short"]),  # after the end
        ("evaluate.every_epochs=0.01", ["short", "whole", "whole"]),
        ("evaluate.at_start=true", ["short", "whole"]),
        ("evaluate.at_start=false", []),
    ],
)
def test_only_a_run_that_evaluates_checks_its_evaluation(tmp_path, setting, checked):
    task = f"task.use={__name__}:SlowReport"
    run("fit", tmp_path, task, *_SHORT, "evaluate.at_end=false", setting)
    report = tmp_path / "report"
    assert (report.read_text().split() if report.exists() else []) == checked


def test_a_metric_that_the_first_samples_lack_may_be_named(tmp_path):
    """37 samples in micro-batches of 6: the last one has a single sample."""
    rare = [f"task.use={__name__}:RareMetric", "evaluate.micro_batch_size=6", "length.steps=6"]
    run("fit", tmp_path / "named", *rare, "early_stop.metric=rare")
    assert curve(tmp_path / "named", "eval/rare").keys() == {6}
    done = run("fit", tmp_path / "unknown", *rare, "early_stop.metric=rarest", expect=64)
    assert "early_stop.metric is 'rarest'" in done.stderr
    assert "reports only loss, rare" in done.stderr
