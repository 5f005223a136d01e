"""What a task's methods leave behind, and what they draw: refused, named or seeded."""

from fractions import Fraction

import pytest
import torch

import train
from tests.support.runs import TINY
from tests.support.tiny import TinyTask
from train import Ratio
from train.exits import UsageError

WORDS = [word for word in TINY if not word.startswith("task.use")]
SHORT = [*WORDS, "length.steps=4", "schedule.warmup_steps=0", "track.console=quiet"]


class BuildsWithoutGradients(TinyTask):
    def build_model(self):
        torch.set_grad_enabled(False)
        return super().build_model()


class CollatesWithoutGradients(TinyTask):
    def collate(self, samples):
        torch.set_grad_enabled(False)
        return super().collate(samples)


class LossWithoutGradients(TinyTask):
    def loss(self, model, batch):
        result = super().loss(model, batch)
        torch.set_grad_enabled(False)
        return result


class ReportsWithoutGradients(TinyTask):
    def report(self, model, device):
        torch.set_grad_enabled(False)
        return {}


class DerivesInDouble(TinyTask):
    def derive(self, totals):
        torch.set_default_dtype(torch.float64)
        return {}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (BuildsWithoutGradients, "gradient mode is off at the start of the first step"),
        (CollatesWithoutGradients, "gradient mode is off at the start of the first step"),
        (LossWithoutGradients, r"first step changed a setting of torch \(gradient mode\)"),
        (ReportsWithoutGradients, r"first evaluation changed a setting of torch \(gradient mode\)"),
        (DerivesInDouble, r"first evaluation changed a setting of torch \(default dtype\)"),
    ],
)
def test_a_setting_of_torch_that_is_left_changed_is_refused(tmp_path, task, said):
    with pytest.raises(UsageError, match=said):
        train.fit(*SHORT, f"run.dir={tmp_path}", task=task)
    assert not (tmp_path / "finished.json").exists()


class RandomMeasure(TinyTask):
    """Draws noise in an evaluation, as diffusion models do."""

    def measure(self, model, batch):
        noisy = {**batch, "x": batch["x"] + torch.randn_like(batch["x"])}
        return {"loss": self.loss(model, noisy)}


def test_random_numbers_of_an_evaluation_are_the_same_each_time(tmp_path, capfd):
    done = train.fit(*SHORT[:-1], f"run.dir={tmp_path}", task=RandomMeasure)
    assert "draws random numbers in an evaluation" in capfd.readouterr().err
    again = train.evaluate(*SHORT, f"run.dir={tmp_path}", task=RandomMeasure)
    assert again == done.metrics


def test_an_evaluation_without_random_numbers_is_not_warned_of(tmp_path, capfd):
    train.fit(*SHORT[:-1], f"run.dir={tmp_path}", task=TinyTask)
    assert "draws random numbers" not in capfd.readouterr().err


class RareShare(TinyTask):
    """Divides by a count that is 0 in most micro-batches, and lacks a name in some."""

    def measure(self, model, batch):
        found = {"loss": self.loss(model, batch)}
        rare = len(batch["x"]) == 1  # the last one
        return {**found, "rare": Ratio(1.0, int(rare)), **({"last": Ratio(3.0, 1)} if rare else {})}

    def derive(self, totals):
        return {
            "share": totals["rare"].sum / totals["rare"].count,
            "last x2": totals["last"].sum * 2,
        }


def test_what_few_samples_do_not_define_is_tried_with_all_before_the_first_step(tmp_path):
    words = [*SHORT, f"run.dir={tmp_path}", "batch.micro_batch_size=12"]
    assert train.fit(*words, task=RareShare).metrics["last x2"] == 6.0


class DividesByZero(TinyTask):
    def derive(self, totals):
        return {"x": 1 / 0}


def test_a_mistake_in_derive_is_found_before_the_first_step(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train.fit(*SHORT, f"run.dir={tmp_path}", task=DividesByZero)
    assert not (tmp_path / "attempts.jsonl").exists()


class Huge(TinyTask):
    where = ""

    def returns(self, name, other):
        return 10**5000 if self.where == name else other

    def facts(self):
        return {"tokens": self.returns("facts", 3)}

    def flops_per_sample(self):
        return self.returns("flops_per_sample", None)

    def measure(self, model, batch):
        return {"loss": Ratio(self.returns("measure", 1), 1)}

    def derive(self, totals):
        return {"x": Fraction(self.returns("derive", 1))}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("facts", "'int beyond the range of a float'"),
        ("flops_per_sample", "int beyond the range of a float"),
        ("measure", "int beyond the range of a float"),
        ("derive", "Fraction for 'x'"),
    ],
)
def test_a_number_beyond_the_range_of_a_float_is_refused(tmp_path, monkeypatch, method, said):
    monkeypatch.setattr(Huge, "where", method)
    with pytest.raises(UsageError, match=rf"{method}\(\) returned .*{said}"):
        train.fit(*SHORT, f"run.dir={tmp_path}", task=Huge)


class NegativeFlops(TinyTask):
    def flops_per_sample(self):
        return -5.0


def test_negative_flops_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"flops_per_sample\(\) returned -5.0; .*at least 0"):
        train.fit(*SHORT, f"run.dir={tmp_path}", task=NegativeFlops)


class NoBatch(TinyTask):
    def collate(self, samples):
        return None


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_a_collate_without_a_return_is_refused(tmp_path, workers):
    words = [*SHORT, f"run.dir={tmp_path}", f"loader.workers={workers}"]
    with pytest.raises(UsageError, match=r"collate\(\) returned None for the samples of indices"):
        train.fit(*words, task=NoBatch)
