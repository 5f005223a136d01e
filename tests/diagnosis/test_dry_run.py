"""``isorun fit --dry-run``."""

import os

import pytest
import torch

from tests.diagnosis.test_overfit import BASE as BROKEN
from tests.support import forked
from tests.support.broken import BrokenTask, Points
from train import Ratio
from train.exits import Exit

PARTS = [
    "start", "data of 4 steps", "step 1", "step 2", "check of the evaluation", "evaluation",
    "report", "checkpoint", "steps 3 to 4", "resume", "the same steps again", "export",
]  # fmt: skip


class WholeTask(BrokenTask):
    """Has all that a run can have."""

    def eval_dataset(self):
        return Points("not")

    def measure(self, model, batch):
        return {"loss": self.loss(model, batch)}

    def report(self, model, device):
        return {"first": str(float(model(torch.zeros(1, 6, device=device))[0, 0]))}

    def example_inputs(self):
        return (torch.zeros(2, 6),)


class RemembersTask(WholeTask):
    """The loss depends on how often it was computed, which no checkpoint has."""

    def loss(self, model, batch):
        self.called = getattr(self, "called", 0) + 1
        ratio = super().loss(model, batch)
        return Ratio(ratio.sum * self.called, ratio.count)


class NoMetricTask(WholeTask):
    def measure(self, model, batch):
        raise ValueError("not written yet")


BASE = ["task.use=tests.diagnosis.test_dry_run:WholeTask", *BROKEN[1:]]


def run(directory, *words, expect=0):
    return forked.run("fit", directory, *words, base=BASE, expect=expect)


def parts_of(output):
    """The names in the table."""
    return [line[:26].strip() for line in output.splitlines()[1:-1]]


def test_each_part_is_tried_and_nothing_is_left(tmp_path):
    done = run(tmp_path / "run", "--dry-run", "length.steps=30", "evaluate.every_steps=10",
               "checkpoint.every_steps=7", "ema.decay=0.9", "batch.micro_batch_size=6")  # fmt: skip
    assert parts_of(done.stdout) == PARTS
    assert "A run of 30 steps takes about " in done.stdout
    assert ", 3 evaluations of " in done.stdout
    assert ", 5 checkpoints of " in done.stdout
    assert "the same losses" in done.stdout
    assert ", 3 micro-batches" in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_there_is_not_touched(tmp_path):
    run(tmp_path / "run", "length.steps=4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    left = tmp_path / ".run.dry-run" / "checkpoints" / "step-000000000002"
    left.mkdir(parents=True)  # by a dry run that was killed
    run(tmp_path / "run", "--dry-run", "length.steps=4")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
def test_all_ranks_try_the_same_steps(tmp_path):
    words = ["--dry-run", "strategy=fsdp2"]
    done = forked.run_ranks(2, "fit", tmp_path / "run", *words, base=BASE)
    one = run(tmp_path / "run", "--dry-run")
    assert parts_of(done[0].stdout) == PARTS
    assert done[1].stdout == ""
    losses = [
        [float(line.split("loss ")[1]) for line in output.splitlines() if "  loss " in line]
        for output in (done[0].stdout, one.stdout)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["task.use=tests.diagnosis.test_dry_run:RemembersTask"], Exit.USAGE,
         "after a resume from the checkpoint of step 2, but"),
        (["task.use=tests.diagnosis.test_dry_run:NoMetricTask"], Exit.INTERNAL, "not written yet"),
        (["batch.micro_batch_size=99"], Exit.USAGE, "batch.micro_batch_size"),
        (["task.how=infinite"], Exit.NOT_FINITE, "The loss was not finite in each of 4 steps"),
    ],
)  # fmt: skip
def test_what_would_fail_later_fails_now(tmp_path, words, code, text):
    done = run(tmp_path / "run", "--dry-run", *words, expect=code)
    assert text in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_hold_the_run_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file" / "run", "--dry-run", expect=Exit.USAGE)
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr
