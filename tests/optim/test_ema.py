"""The averaged weights: their formula, and their use in evaluation and export."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.forked import run
from tests.support.runs import assert_same_bits, curve, tensors
from tests.support.strategies import single
from train.optim.ema import Ema, EmaConfig

KEPT, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made[2].bias.requires_grad_(False)
    return made


def averaging(module):
    strategy = single(module, lambda placed: torch.optim.SGD(placed.parameters()))
    return Ema(EmaConfig(decay=0.75), strategy)


def locals_of(ema):
    return {name: shard.local for name, shard in ema.averages.items()}


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_formula():
    module = model()
    ema = averaging(module)
    expected = {n: p.detach().double() for n, p in module.named_parameters() if p.requires_grad}
    for _ in range(20):
        move(module)
        ema.update(KEPT)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach().double()
    assert locals_of(ema).keys() == expected.keys()
    assert "2.bias" not in expected
    for name, average in locals_of(ema).items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_skipped_step_changes_no_bit():
    module = model()
    ema = averaging(module)
    move(module)
    ema.update(KEPT)
    before = {name: average.clone() for name, average in locals_of(ema).items()}
    move(module)
    ema.update(SKIPPED)
    assert_same_bits(before, locals_of(ema))


def test_weights_are_restored_bitwise_even_after_an_error():
    module = model()
    ema = averaging(module)
    move(module)
    ema.update(KEPT)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    averages = {name: average.clone() for name, average in locals_of(ema).items()}
    with pytest.raises(ZeroDivisionError), ema.applied():  # noqa: PT012
        inside = dict(module.named_parameters())
        assert_same_bits(averages, {name: inside[name].detach() for name in averages})
        assert torch.equal(inside["2.bias"], weights["2.bias"])
        raise ZeroDivisionError
    assert_same_bits(weights, {name: p.detach() for name, p in module.named_parameters()})
    assert_same_bits(averages, locals_of(ema))


def test_after_an_error_no_rank_waits_for_the_others(monkeypatch):
    """Only this rank may have failed, so that nothing collective may follow."""
    ema, calls = averaging(model()), []
    monkeypatch.setattr(ema.strategy, "sync_weights", lambda: calls.append(1))
    with ema.applied():
        assert calls == [1]
    assert calls == [1, 1]
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert calls == [1, 1, 1]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("averaged")
    rules = ["length.steps=12", "checkpoint.every_steps=1", "checkpoint.keep_last=99"]
    run("fit", directory, *rules, "ema.decay=0.9")
    return directory


def test_a_run_averages_every_step(averaged):
    """From checkpoint to checkpoint, in float64."""
    before = tensors(averaged, 1)
    for step in range(2, 13):
        after = tensors(averaged, step)
        names = [name.removeprefix("ema.") for name in after if name.startswith("ema.")]
        assert len(names) == 6
        for name in names:
            weight, average = after[f"model.{name}"].double(), before[f"ema.{name}"].double()
            torch.testing.assert_close(
                after[f"ema.{name}"].double(), 0.9 * average + 0.1 * weight, rtol=1e-5, atol=1e-7
            )
        before = after


def test_the_average_does_not_change_the_training(averaged, tmp_path):
    run("fit", tmp_path, "length.steps=12")
    assert curve(tmp_path) == curve(averaged)
    assert curve(tmp_path, "eval/loss") != curve(averaged, "eval/loss")


def test_evaluation_and_export_use_the_average(averaged, tmp_path):
    finished = json.loads((averaged / "finished.json").read_text())
    evaluated = run("evaluate", averaged, "length.steps=12", "ema.decay=0.9", "--json")
    assert json.loads(evaluated.stdout)["loss"] == finished["metrics"]["loss"]
    assert loss_by_hand(averaged, "ema.") == pytest.approx(finished["metrics"]["loss"], rel=1e-6)
    assert loss_by_hand(averaged, "model.") != pytest.approx(finished["metrics"]["loss"], rel=1e-3)

    run("export", averaged, "length.steps=12", "ema.decay=0.9", "--to", tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    stored = tensors(averaged)
    assert_same_bits({n: stored[f"ema.{n}"] for n in exported}, exported)


def loss_by_hand(directory, kind):
    """Evaluates again, sample by sample, without the code of the loop."""
    import random

    import numpy as np

    from tests.support.runs import TINY
    from train.config.load import load_config
    from train.data.fetch import EVALUATION
    from train.data.order import sample_seed

    loaded = load_config([], [*TINY, "length.steps=12"], runs=False)
    task = loaded.task(loaded.config)
    module, dataset = task.build_model().eval(), task.eval_dataset()
    stored = tensors(directory)
    module.load_state_dict({name: stored[kind + name] for name in module.state_dict()})
    total = count = 0.0
    for index in range(len(dataset)):
        seed = sample_seed(loaded.config.run.seed, EVALUATION, index)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        with torch.no_grad():
            part = task.loss(module, task.collate([dataset[index]]))
        total, count = total + part.sum.item(), count + part.count.item()
    return total / count


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    run("fit", tmp_path, "length.steps=2", "schedule.warmup_steps=0")
    done = run("evaluate", tmp_path, "ema.decay=0.9", expect=76)
    assert "  ema: None -> {'decay': 0.9" in done.stderr
