"""One optimiser step: clipping, and skipping if a value is not finite."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support import strategies
from tests.support.ranks import on_ranks
from tests.support.runs import assert_same_bits, tiny_config
from train.data.plan import BatchPlan
from train.distributed.randomness import seed_everything
from train.exits import RetryError, UsageError
from train.optim.optim_config import OptimConfig
from train.optim.optimizer import build_optimizer
from train.setup.model_summary import model_summary
from train.strategies.base import StrategySetup
from train.strategies.ddp import DdpStrategy
from train.strategies.single import SingleStrategy
from train.strategies.torch_native import flag_is_beside


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def prepared(on_device, **values):
    optim = OptimConfig(lr=0.1, **values)
    strategy = strategies.single(model(), lambda module: build_optimizer(optim, module))
    strategy.skips_on_device = on_device
    return strategy


def step(strategy, factor=1.0, clip_norm=None):
    seed_everything(5)
    strategy.zero_grad()
    loss = (
        strategy.call_for_backward(lambda model: model(torch.randn(4, 5)).square().sum()) * factor
    )
    strategy.backward(loss, 4)
    return strategy.step(loss.detach, clip_norm)


def weights(strategy):
    return {name: p.detach().clone() for name, p in strategy.bare_model.named_parameters()}


def state(strategy):
    names = {p: name for name, p in strategy.bare_model.named_parameters()}
    return {
        f"{names[p]}.{key}": value.clone()
        for p, entries in strategy.optimizer.state.items()
        for key, value in entries.items()
    }


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "host"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(on_device, bad):
    """The weights and the optimiser state, including the step count, keep every bit."""
    strategy = prepared(on_device)
    assert step(strategy).skipped.item() == 0.0
    before = weights(strategy), state(strategy)
    result = step(strategy, bad)
    assert result.skipped.item() == 1.0
    assert_same_bits(before[0], weights(strategy))
    assert_same_bits(before[1], state(strategy))


def test_skipping_on_the_device_and_on_the_host_are_equivalent():
    both = [prepared(on_device) for on_device in (True, False)]
    for strategy in both:
        for factor in (1.0, float("nan"), 2.0, float("inf"), 0.5):
            step(strategy, factor, clip_norm=0.3)
    first, second = both
    assert_same_bits(weights(first), weights(second))
    assert_same_bits(state(first), state(second))
    assert state(first)["0.weight.step"] == 3


def test_a_flag_on_the_device_is_used_only_beside_the_parameters():
    """``fsdp2.cpu_offload`` has them on the CPU, where the optimiser would read the flag too early.
    Here "meta" is the device."""
    device, host = torch.device("meta"), torch.device("cpu")
    on_device, on_host = torch.zeros(1, device=device), torch.zeros(1)
    assert flag_is_beside([on_device, on_device], device)
    assert not flag_is_beside([on_host, on_host], device)
    assert not flag_is_beside([on_device, on_host], device)
    assert not flag_is_beside([on_host], host)


def test_a_skipped_first_step_has_no_effect():
    """The optimiser has no state yet; its momentum must not start from a NaN."""
    strategy = prepared(False, use="sgd", momentum=0.9)
    step(strategy, float("nan"))
    step(strategy)
    expected = prepared(False, use="sgd", momentum=0.9)
    step(expected)
    assert_same_bits(weights(expected), weights(strategy))


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
def test_clipping_matches_torch(clip_norm):
    strategy = prepared(False)
    module = copy.deepcopy(strategy.bare_model)
    result = step(strategy, clip_norm=clip_norm)
    seed_everything(5)
    (module(torch.randn(4, 5)).square().sum() / 4).backward()
    limit = float("inf") if clip_norm is None else clip_norm
    norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for expected, got in zip(module.parameters(), strategy.bare_model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_seeding_matches_the_libraries():
    import random

    import numpy as np

    seed_everything(2**63 + 5)
    drawn = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(2**63 + 5)
    random.seed(2**63 + 5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1:] == (random.random(), np.random.rand())


def test_fp16_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("a GPU is available")
    with pytest.raises(UsageError, match=r"precision is 'fp16'.*bf16 or fp32"):
        strategies.engine(precision="fp16")


def test_ddp_accumulates_where_accelerate_wraps_no_model():
    """As on one GPU, where it does not wrap the model of a single process."""
    build, options = partial(build_optimizer, OptimConfig(lr=0.1)), tiny_config().ddp
    made = [
        strategies.single(model(), build),
        strategies.single(model(), build, DdpStrategy, options),
    ]
    for strategy in made:
        seed_everything(5)
        for last in (False, True):
            with strategy.accumulating(last=last):
                loss = strategy.call_for_backward(lambda m: m(torch.randn(4, 5)).square().sum())
                strategy.backward(loss, 8)
        strategy.step(loss.detach, None)
    assert_same_bits(*map(weights, made))


def test_single_is_refused_on_several_ranks():
    def prepare(collectives):
        setup = StrategySetup(
            engine=SimpleNamespace(world_size=2, collectives=collectives), name="mine:Single",
            options=None, precision="fp32", optimizer_name="adamw",
            plan=BatchPlan(12, None, 2), blocks=[],
        )  # fmt: skip
        SingleStrategy(setup).prepare(torch.nn.Linear(1, 1), None)

    errors = on_ranks(2, prepare)
    for error in errors:
        assert isinstance(error, UsageError)
        assert "'mine:Single', which exchanges no gradients, but there are 2 ranks" in str(error)


def test_missing_processes_are_detected():
    """For example, the launcher sets WORLD_SIZE to 2, but Accelerate is not configured for it."""
    with pytest.raises(RetryError, match=r"WORLD_SIZE is 2.*found 1 process"):
        strategies.engine(replace(strategies.ALONE, world_size=2))


def test_the_summary_counts_shared_parameters_once():
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.LayerNorm(4))
    module[1].weight = module[0].weight
    module[2].requires_grad_(False)
    lines = [line.split() for line in model_summary(module).splitlines()]
    assert lines[1][-2:] == ["40", "0"]
    assert lines[3][-2:] == ["0", "8"]
    assert lines[4] == ["total", "(Sequential)", "40", "8"]
    assert "counted once" in model_summary(module)
