"""Activation checkpointing changes no gradient, no buffer and no random number."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from tests.support.hf import FAMILIES, build
from tests.support.lanes import thinned
from train.exits import Exit, UsageError
from train.process.diagnose import as_run_error
from train.strategies.blocks import find_blocks
from train.strategies.recomputation import checkpoint_activations


class Reassigning(nn.Module):
    """Replaces its buffer instead of changing it, and uses it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh(x - self.mean)


BLOCKS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "hooked spectral norm": lambda: nn.Sequential(hooked_spectral_norm(nn.Linear(6, 6))),
    "reassigned": lambda: nn.Sequential(nn.Linear(6, 6), Reassigning()),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)),
    "none": lambda: nn.Linear(6, 6),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_nothing_but_memory_depends_on_it(kind):
    torch.manual_seed(0)
    plain = nn.Sequential(BLOCKS[kind](), nn.Tanh(), BLOCKS[kind]())
    recomputed = copy.deepcopy(plain)
    checkpoint_activations([recomputed[0], recomputed[2]])
    for model in (plain, recomputed):
        torch.manual_seed(1)
        for _ in range(3):  # two passes in a loss, several losses
            x = torch.randn(5, 6)
            (model(x) * model(0.5 * x)).square().sum().backward()
    expected = {**dict(plain.named_buffers()), **{n: p.grad for n, p in plain.named_parameters()}}
    found = {
        **dict(recomputed.named_buffers()),
        **{n: p.grad for n, p in recomputed.named_parameters()},
    }
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_activations_are_recomputed():
    passes = []
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    block[0].register_forward_hook(lambda *_: passes.append(1))
    checkpoint_activations([block])
    block(torch.randn(4, 6)).sum().backward()
    assert len(passes) == 2


class Appending(nn.Linear):
    """Changes its argument, as a cache of keys and values does."""

    def __init__(self):
        super().__init__(6, 6)

    def forward(self, x, seen):
        if seen:
            raise ValueError("too many")
        seen.append(super().forward(x))
        return seen[0]


class Counting(nn.Linear):
    """Computes another shape each time."""

    passes = 0

    def __init__(self):
        super().__init__(6, 6)

    def forward(self, x):
        self.passes += 1
        return torch.cat([super().forward(x)] * self.passes).tanh().sum()


def test_a_block_that_fails_when_recomputed_is_named():
    block = Appending()
    checkpoint_activations([block])
    loss = block(torch.randn(4, 6), []).sum()
    with pytest.raises(UsageError, match="Appending fails when it is recomputed .*too many"):
        loss.backward()


def test_a_block_that_computes_something_else_is_refused():
    block = Counting()
    checkpoint_activations([block])
    with pytest.raises(RuntimeError) as caught:
        block(torch.randn(4, 6)).backward()
    found = as_run_error(caught.value)
    assert found is not None
    assert found.code == Exit.USAGE
    assert "set activation_checkpointing=false" in str(found)


@pytest.mark.parametrize("family", thinned(list(FAMILIES), kept=["llama"]))
def test_hugging_face_models_are_recomputed_without_their_cache(family):
    torch.manual_seed(0)
    plain = build(family).train()
    recomputed = copy.deepcopy(plain)
    checkpoint_activations(find_blocks(recomputed, [], []))
    tokens = torch.randint(1, 40, (3, 12))
    for model in (plain, recomputed):
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens, use_cache=True).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_keys_and_values_of_earlier_tokens_are_refused():
    model = build("llama").train()
    tokens = torch.randint(1, 40, (3, 6))
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    checkpoint_activations(find_blocks(model, [], []))
    with pytest.raises(UsageError, match="gets keys and values of earlier tokens"):
        model(input_ids=tokens, past_key_values=cache)
    with torch.no_grad():  # as in generation
        model(input_ids=tokens, past_key_values=cache)
