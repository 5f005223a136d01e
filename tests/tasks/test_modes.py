"""Modules that a task puts into evaluation mode stay in it."""

import pytest
from torch import nn

from tests.support.forked import run, run_ranks
from tests.support.runs import tensors
from train.tasks.modes import evaluating, start_training


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))


def in_training(module):
    return [name for name, each in module.named_modules() if each.training]


def test_modules_in_evaluation_mode_stay_in_it():
    made = model()
    made[1].eval()
    assert start_training(made) == ["1"]
    assert in_training(made) == ["", "0"]


def test_a_single_module_may_stay_in_evaluation_mode():
    made = model()
    made[1][0].eval()
    assert start_training(made) == ["1.0"]
    assert in_training(made) == ["", "0", "1", "1.1"]


def test_a_model_in_evaluation_mode_as_a_whole_is_trained():
    made = model().eval()
    assert start_training(made) == []
    assert len(in_training(made)) == 5


def fail_in_evaluation(made):
    with evaluating(made):
        assert in_training(made) == []
        raise ZeroDivisionError


def test_an_evaluation_restores_each_mode_even_after_an_error():
    made = model()
    made[1][0].eval()
    with pytest.raises(ZeroDivisionError):
        fail_in_evaluation(made)
    assert in_training(made) == ["", "0", "1", "1.1"]


@pytest.mark.parametrize("strategy", [None, "ddp", "fsdp2", "zero1"])
def test_the_statistics_of_a_part_in_evaluation_mode_stay(tmp_path, strategy):
    words = [
        "task.use=tests.faults.tasks:FrozenNorm", "length.steps=6", "evaluate.every_steps=2",
        "batch.micro_batch_size=6",
    ]  # fmt: skip
    if strategy:
        done = run_ranks(2, "fit", tmp_path, *words, f"strategy={strategy}")[0]
    else:
        done = run("fit", tmp_path, *words)
    assert "(in evaluation mode, as built: 1)" in done.stdout
    stored = tensors(tmp_path)
    assert stored["model.1.num_batches_tracked"] == 0
    assert (stored["model.1.running_mean"] == 0).all()
