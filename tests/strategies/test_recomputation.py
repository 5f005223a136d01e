"""Activation checkpointing changes no gradient, no buffer and no random number."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from train.strategies.blocks import checkpoint_activations


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
